"""What a training costs beside its steps: the time to the first one, the stall of a checkpoint, the memory.

    python benchmarks/costs.py DATA [--device cuda] [--rounds 5] [--resume]

The first step: from the start of `diffkit train DATA` to its first line of figures, beside `python -c "import torch"`,
in turns. The stall: how long a step is held up by a checkpoint, and how much slower steps are while it is written. The
memory: the most that a training of diffusers' UNet2DModel at batch 64 holds, each trainer in a process of its own; of a
GPU what its tensors take, since what torch keeps beside them depends on what was tried before. Writes
results/costs-DEVICE.json, part by part.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import asked, begun, only_steps, place, scratch, show, spread, units, write
from training import diffusers_network, files

SAVES, STEPS_BETWEEN = 8, 12


def first_step(data: Path, device: str, rounds: int) -> dict[str, Any]:
    """Seconds from the start of a process."""
    found: dict[str, list[float]] = {"import torch": [], "diffkit train": []}
    for _ in range(rounds + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        found["import torch"].append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "diffkit", "train", str(data), "-o", f"{folder}/run", "--device", device]
            start = time.perf_counter()
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert process.stderr is not None
            for line in process.stderr:
                if "loss" in line and "img/s" in line:
                    break
            found["diffkit train"].append(time.perf_counter() - start)
            process.kill()
            process.wait()
        print({name: round(values[-1], 2) for name, values in found.items()}, flush=True)
    return {name: spread(values[1:]) for name, values in found.items()}  # the first reads files from the disk


def stall(data: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of a plain step, of steps while a checkpoint is written, for which it holds one up, and lost in all.

    Lost is what the training, from the save to the first step after it is written, took longer than plain steps.
    """
    from diffkit.compose.start import prepare_training
    from diffkit.engine.gradients import STEPS_TRIED
    from diffkit.engine.graphs import graphs_on
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir

    store = Store.open(data)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "run")
        training = prepare_training({"data": {"path": str(data)}}, store, run, str(device))
        training.begin()
        copied, waits = training.saver.copied, [0.0]

        def timed() -> None:
            start = time.perf_counter()
            copied()
            waits.append(time.perf_counter() - start)

        training.saver.copied = timed  # type: ignore[method-assign]
        steps = only_steps(training.steps())

        def step() -> float:
            start = time.perf_counter()
            next(steps)
            return time.perf_counter() - start

        for _ in range(4 + (STEPS_TRIED if graphs_on(device) else 0)):
            step()
        training.saver.reserve(training.state.checkpoint())
        plain, beside, stalls, written, whole = [], [], [], [], []
        for _ in range(SAVES):
            plain += [step() for _ in range(STEPS_BETWEEN)]
            start = time.perf_counter()
            writing = training.save()
            begun = time.perf_counter() - start
            meanwhile = [step()]
            queued = max(0.0, meanwhile[0] - sorted(plain)[len(plain) // 2]) if device.type == "cuda" else 0.0
            stalls.append(begun + waits[-1] + queued)  # on a GPU the copies are in its queue, before the step
            while not writing.done():
                meanwhile.append(step())
            writing.result()
            beside += meanwhile
            whole.append((begun + sum(meanwhile), len(meanwhile)))
            written.append(time.perf_counter() - start)
        state = sum(tensor.nbytes for tensor in training.state.checkpoint().tensors.values())
    usual = sorted(plain)[len(plain) // 2]
    return {
        "state_bytes": state,
        "step_seconds": spread(plain),
        "step_while_writing_seconds": spread(beside),
        "stall_seconds": spread(stalls),
        "stall_share_of_step": round(sorted(stalls)[len(stalls) // 2] / usual, 4),
        "written_seconds": spread(written),
        "lost_seconds": spread([seconds - steps * usual for seconds, steps in whole]),
    }


def held(name: str, folder: Path, data: Path, size: int, batch: int, device: torch.device, answer: Any) -> None:
    """In a process of its own: some steps of a trainer, then the most memory that it held."""
    import peers
    from diffkit.engine.devices import choose_precision

    network = diffusers_network(size, device.type == "cuda").to(device)
    before = most(device)
    if name == "diffkit":
        precision = choose_precision("auto", device, lambda: network(torch.zeros(8, 3, size, size), 0).sample)
        network.zero_grad(set_to_none=True)
        steps = peers.diffkit(
            peers.AsBackbone(network, 250.0, lambda found: found.sample), data, batch, device, precision
        )
    else:
        steps = peers.alone(peers.diffusers(name.split()[1], network, folder, size, batch, device))
    next(steps)  # the first may choose its way by trial, which is not what a training holds
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(4):
        next(steps)
    answer.put((most(device), before))


def most(device: torch.device) -> int:
    """Bytes held at most: by tensors on a GPU, else by the process."""
    from diffkit.engine.devices import memory_used

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory_used(device) or 0


def memory(device: torch.device, temporary: Path) -> dict[str, Any]:
    """Bytes, by trainer: of the device, or of the process (libraries included, and also counted on their own)."""
    size, batch = (128, 64) if device.type == "cuda" else (32, 64)
    results = {}
    folder, data = files(temporary, size)
    context = multiprocessing.get_context("spawn")
    for name in ("diffkit", "diffusers stock", "diffusers tuned"):
        answer = context.Queue()
        process = context.Process(target=held, args=(name, folder, data, size, batch, device, answer))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{name} has failed.")
        most, before = answer.get()
        results[name] = {"peak_bytes": most, "before_bytes": before}
        print(name, f"{(most - before) / 2**20:.0f} MiB", flush=True)
    return {"size": size, "batch": batch, "trainers": results}


def table(results: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md."""
    parts = {"first_step": _first_table, "checkpoint": _checkpoint_table, "memory": _memory_table}
    return "\n\n".join(make(results[name]) for name, make in parts.items() if name in results)


def _first_table(first: dict[str, Any]) -> str:
    more = first["diffkit train"]["median"] - first["import torch"]["median"]
    lines = [
        "| what | median | range |",
        "|---|---|---|",
        *(
            f"| {name}, seconds | {each['median']:.2f} | {each['min']:.2f} to {each['max']:.2f} |"
            for name, each in first.items()
        ),
        "",
        f"So the first step is logged {more:.1f} s after what importing torch alone takes.",
    ]
    return "\n".join(lines)


def _checkpoint_table(saving: dict[str, Any]) -> str:
    return (
        f"A checkpoint of {saving['state_bytes'] / 2**20:.0f} MiB holds a step up for "
        f"{1000 * saving['stall_seconds']['median']:.0f} ms ({1000 * saving['stall_seconds']['min']:.0f} to "
        f"{1000 * saving['stall_seconds']['max']:.0f}), {saving['stall_share_of_step']:.1%} of a step of "
        f"{1000 * saving['step_seconds']['median']:.0f} ms; it is on the disk after "
        f"{saving['written_seconds']['median']:.2f} s, and steps take "
        f"{1000 * saving['step_while_writing_seconds']['median']:.0f} ms meanwhile, so that a checkpoint costs "
        f"{saving['lost_seconds']['median']:.2f} s of training in all."
    )


def _memory_table(memory_found: dict[str, Any]) -> str:
    lines = [
        f"UNet2DModel at {memory_found['size']}x{memory_found['size']}, batch {memory_found['batch']}:",
        "",
        "| trainer | peak memory, above libraries and network | diffkit's share |",
        "|---|---|---|",
    ]
    own = {name: each["peak_bytes"] - each["before_bytes"] for name, each in memory_found["trainers"].items()}
    lines += [f"| {name} | {each / 2**20:,.0f} MiB | {own['diffkit'] / each:.2f} |" for name, each in own.items()]
    return "\n".join(lines)


def main() -> None:
    options = asked(data=True, rounds=5)
    device = options.device
    name = f"costs-{place(device)}"
    results = begun(name, device, options.resume)

    def keep() -> None:
        print(json.dumps(results, indent=1))
        write(name, results, device)
        show("costs", device, table, place(device))

    with scratch(options) as folder:
        makers: dict[
            str, Callable[[], Any]
        ] = {  # the memory first: what this process then holds of a GPU would be wanting
            "memory": lambda: memory(device, folder),
            "first_step": lambda: first_step(options.data, str(device), options.rounds),
            "checkpoint": lambda: stall(options.data, device),
        }
        units(results, makers, keep)


if __name__ == "__main__":
    main()
