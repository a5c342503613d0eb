"""Trainings that go on otherwise, twice, in several processes, without memory, or diverge."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkit.selftest.actions import ACTIONS, TINY, content, difference, newest_checkpoint
from diffkit.selftest.bench import Bench, Trial, Untestable, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.processes import command_of, descendants, kill

BARE = (*TINY, "--preview-every", "0", "--validate-every", "0")


@row(11, "a training goes on with another micro-batch")
def micro_batches(bench: Bench) -> Iterator[Trial]:
    return bench.each(resumed_in_pieces, [(size,) for size in (8, 4, 3, 2, 1)])


@row(12, "a training goes on with two processes, and then with one again", slow=True)
def elastic(bench: Bench) -> Iterator[Trial]:
    return bench.cases(one_two_one)


@row(13, "the same command elsewhere: other hash seed, folder, locale, order of files", slow=True)
def again(bench: Bench) -> Iterator[Trial]:
    return bench.cases(other_order, other_process)


@row(14, "a loss or a weight that is not finite")
def non_finite(bench: Bench) -> Iterator[Trial]:
    return bench.each(diverging, [("1e38",), ("1e30",), ("1e20",)])


@row(15, "too little memory for a pass")
def out_of_memory(bench: Bench) -> Iterator[Trial]:
    return bench.each(with_little_memory, [(images,) for images in (7, 4, 2, 1, 0)])


@row(16, "one of two processes is killed, or hangs", slow=True)
def ranks(bench: Bench) -> Iterator[Trial]:
    if sys.platform != "linux":
        raise Untestable("processes are found through /proc")
    return bench.each(rank_lost, [(signal.SIGKILL,), (signal.SIGSTOP,)])


def losses(run: Path) -> dict[int, float]:
    """By images seen."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["images"]: record["loss"] for record in records if "loss" in record}


def _apart(expected: Path, found: Path, within: float) -> str:
    one, other = losses(expected), losses(found)
    if one.keys() != other.keys():
        return f"steps at {sorted(other)} instead of {sorted(one)}"
    most = max(abs(other[at] / one[at] - 1) for at in one)
    return "" if most <= within else f"losses differ by {most:.1e} of themselves"


def resumed_in_pieces(lab: Lab, size: int) -> Trial:
    """Pieces of a batch change nothing but the order of sums."""
    room = ACTIONS["resume"].begin(lab)
    outcome = lab.diffkit(*ACTIONS["resume"].words(lab), "--micro-batch", size, here=room)
    problem = outcome.unlike(0) or _apart(lab.folder / "expected" / "resume", room / "run", 1e-6)
    Lab.clear(room)
    return Trial(f"pieces of {size}", problem)


def _processes(lab: Lab, room: Path, steps: int, count: int) -> subprocess.Popen[str]:
    """A training in processes of their own, which the launcher starts."""
    words = ["train", str(lab.data), "-o", "run", "--steps", str(steps), *BARE, "--save-every", "0s"]
    return subprocess.Popen(
        [sys.executable, "-m", "diffkit", *words, *(["--gpus", str(count)] if count > 1 else [])],
        cwd=room,
        env={**os.environ, "XDG_CACHE_HOME": str(lab.folder / "cache"), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def one_two_one(lab: Lab, room: Path) -> str:
    """One process, then two, then one."""
    for steps, count in ((2, 1), (4, 2), (6, 1)):
        process = _processes(lab, room, steps, count)
        output = process.communicate(timeout=300)[0]
        if process.returncode:
            return f"{count} processes end with {process.returncode}: {output[-300:]}"
    return _apart(lab.folder / "expected" / "train", room / "run", 1e-5)


def rank_lost(lab: Lab, what: int) -> Trial:
    """All processes are gone within 30 s, and the run goes on afterwards."""
    room = lab.room()
    process = _processes(lab, room, 100_000, 2)
    problem = _lose(process, room, what)
    if not problem:
        words = ("train", lab.data, "-o", "run", "--steps", str(10**6), *BARE, "--time", "1s")
        problem = lab.diffkit(*words, here=room).unlike(0, "going on from")
    Lab.clear(room)
    return Trial(f"{signal.Signals(what).name} to one of two processes", problem)


def _lose(process: subprocess.Popen[str], room: Path, what: int) -> str:
    deadline = time.monotonic() + 120
    while not newest_checkpoint(room / "run") and process.poll() is None:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    children = descendants(process.pid)
    workers = [pid for pid in children if "train" in command_of(pid)]
    if process.poll() is not None or not workers:
        process.kill()
        return f"it has not begun: {process.communicate()[0][-300:]}"
    os.kill(workers[-1], what)
    begun = time.monotonic()
    try:
        output = process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "still there after 60 s"
    finally:
        left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
        kill(left)
    if time.monotonic() - begun > 30:
        return f"took {time.monotonic() - begun:.0f} s"
    if left:
        return f"{len(left)} processes were left behind"
    return "" if process.returncode else f"exit 0: {output[-300:]}"


def other_order(lab: Lab, room: Path) -> str:
    """Images that were written in another order are prepared alike."""
    for path in sorted(lab.images.rglob("*.png"), reverse=True):
        copy = room / "images" / path.relative_to(lab.images)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    lab.diffkit("prepare", room / "images", "-o", "set", "--size", "12", "--holdout", "10%", here=room)
    found, expected = content(room / "set"), content(lab.data)
    differing = [name for name in expected if name.endswith(".npy") and found.get(name) != expected[name]]
    return f"{differing[0]} is different" if differing else ""


def other_process(lab: Lab, room: Path) -> str:
    """A process of its own, with another hash seed and locale, trains to the same bits."""
    done = subprocess.run(
        [sys.executable, "-m", "diffkit", *ACTIONS["train"].words(lab)],
        cwd=room,
        env={**os.environ, "PYTHONHASHSEED": "12345", "LC_ALL": "C", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        return f"exit {done.returncode}: {done.stderr[-300:]}"
    return difference(lab.folder / "expected" / "train", room / "run")


def diverging(lab: Lab, lr: str) -> Trial:
    """Training ends with 6, and nothing that is not finite is on the disk."""
    import torch

    from diffkit.engine.modelfile import read_tensors

    room = lab.room()
    words = ("train", lab.data, "-o", "run", "--steps", "40", *TINY, "--save-every", "0s", "--lr", lr)
    problem = lab.diffkit(*words, here=room).unlike(6, "images")
    for file in (room / "run").rglob("*.safetensors"):
        if not all(bool(torch.isfinite(tensor).all()) for tensor in read_tensors(file)[0].values()):
            problem = problem or f"{file.relative_to(room)} holds what is not finite"
    Lab.clear(room)
    return Trial(f"learning rate {lr}", problem)


@dataclass(frozen=True)
class LittleMemory:
    """Any module's pass over more than so many images fails as if the memory were full."""

    images: int

    def __call__(self) -> None:
        import torch

        def check(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            first = inputs[0] if inputs else None
            if isinstance(first, torch.Tensor) and first.ndim == 4 and len(first) > self.images:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        torch.nn.modules.module.register_module_forward_pre_hook(check)


def with_little_memory(lab: Lab, images: int) -> Trial:
    """Passes are halved until they fit; the training stays the same but for rounding."""
    room = lab.room()
    words = ("train", lab.data, "-o", "run", "--steps", "6", *BARE)
    outcome = lab.diffkit(*words, here=room, setup=[LittleMemory(images)])
    problem = outcome.unlike(0 if images else 4, "memory")
    problem = problem or (_apart(lab.folder / "expected" / "train", room / "run", 1e-6) if images else "")
    halvings = math.ceil(math.log2(8 / images)) if images else 0
    if not problem and images and outcome.output.lower().count("out of memory") != halvings:
        problem = f"{outcome.output.lower().count('out of memory')} warnings for {halvings} halvings"
    Lab.clear(room)
    return Trial(f"memory for {images} images", problem)
