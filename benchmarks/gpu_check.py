"""Whether diffkit computes on this GPU what it should, and how fast: one verdict for each section, with figures.

    python benchmarks/gpu_check.py [--device cuda] [--only philox,saver] [--minutes 9] [--small] [--wheels FOLDER]

Needs torch and what diffkit imports, from this checkout: nothing is installed. WHEELS is a folder that `gpu_wheels.py`
has filled; what is missing here is unpacked from there. Each section runs by itself: an error, a crash or an hour-long
wait of one costs the others nothing. The first sections say whether the results are right, by comparison with a CPU;
the last ones where the time goes. No section begins after --minutes. With `--device cpu` a few say that there is
nothing to check. `--small`: with tiny networks, to see that the check itself works.

Writes results/gpu-check-DEVICE.json after every section, errors included; sections of an earlier call stay there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from common import RESULTS  # noqa: E402
from gpu_wheels import unpacked  # noqa: E402

SECTIONS = (
    *("env", "philox", "noise", "norms", "training", "sampling", "graphs", "syncs", "saver", "resume", "oom", "ready"),
    *("limits", "pieces", "profile", "ways"),
)
NEEDED = ("numpy", "PIL", "pluggy", "pydantic", "tomli_w", "torch")
LONGEST = 200.0
"""Seconds of a section; on a GPU most of them go into compiling."""


def run_sections(names: Sequence[str], device: str, small: bool, answers: Connection) -> None:
    """In a process of its own: send what the machine is, then each section's result.

    Ends before the last one where an error has left the device of no use to the process.
    """
    import torch
    from common import environment, place
    from gpu_exact import SECTIONS as EXACT
    from gpu_kernels import SECTIONS as KERNELS
    from gpu_lab import Lab, NotHere, Wrong
    from gpu_speed import SECTIONS as SPEED

    there = torch.device(device)
    if there.type == "cuda":
        there = torch.device("cuda", there.index or 0)
        torch.cuda.set_device(there)
    answers.send({"place": place(there), "environment": environment(there)})
    lab, sections = Lab(there, small), {section.__name__: section for section in (*EXACT, *KERNELS, *SPEED)}
    for name in names:
        start, spoilt = time.perf_counter(), False
        result: dict[str, Any]
        try:
            result = {"verdict": "ok", **sections[name](lab)}
        except NotHere as error:
            result = {"verdict": "not here", "reason": str(error)}
        except Wrong as error:
            result = {"verdict": "wrong", "reason": str(error), **error.figures}
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            result = {"verdict": "error", "reason": said[:500], "traceback": traceback.format_exc().splitlines()[-16:]}
            spoilt = "CUDA error" in said or "cuDNN error" in said
        answers.send({**result, "seconds": round(time.perf_counter() - start, 1)})
        if spoilt:
            return
        lab.free()


def results(names: Sequence[str], device: str, small: bool, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each section's result, in as few processes as it takes; by "", before them, what the machine is."""
    context, left, deadline = multiprocessing.get_context("spawn"), list(names), time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        answers, other_end = context.Pipe(duplex=False)
        child = context.Process(target=run_sections, args=(left, device, small, other_end))
        child.start()
        other_end.close()
        try:
            about = _answer(answers, LONGEST)
            if about is not None:
                yield "", about
            while left:
                result = _answer(answers, min(LONGEST, max(1.0, deadline - time.monotonic())))
                if result is None:
                    break
                yield left.pop(0), result
            if left:
                child.join()
                if child.exitcode:
                    yield left.pop(0), {"verdict": "error", "reason": f"Its process ended with {child.exitcode}."}
        except TimeoutError:
            yield left.pop(0), {"verdict": "error", "reason": "It took too long, and was ended."}
        finally:
            child.kill()
            child.join()
            answers.close()
    for name in left:
        yield name, {"verdict": "not run", "reason": "The time was up: give it with --only."}


def _answer(answers: Connection, seconds: float) -> dict[str, Any] | None:
    """What the process sends next; None if it has ended. Raises TimeoutError."""
    if not answers.poll(seconds):
        raise TimeoutError
    try:
        found: dict[str, Any] = answers.recv()
    except EOFError:
        return None
    return found


def in_short(result: dict[str, Any]) -> str:
    """A result on one line."""
    left_out = ("verdict", "seconds", "traceback", "at", "slowest", "reason")
    figures = json.dumps({key: value for key, value in result.items() if key not in left_out})
    return f"{result.get('reason', '')} {figures if len(figures) < 400 else figures[:400] + ' ...'}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"There is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    with tempfile.TemporaryDirectory() as site:
        if options.wheels:
            sys.path.append(str(unpacked(options.wheels, Path(site))))
        if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
            parser.error(f"{', '.join(missing)} cannot be imported: give a folder of `make gpu-wheels` with --wheels.")
        if options.device.startswith("cuda") and not _has_gpu():
            parser.error("torch finds no GPU here. `--device cpu --small` rehearses the sections without one.")
        raise SystemExit(run(names, options.device, options.small, 60 * options.minutes, options.out))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(names: Sequence[str], device: str, small: bool, seconds: float, out: Path) -> int:
    """Check, print and write; 1 if anything is wrong."""
    file, kept, bad = out / "gpu-check.json", dict[str, Any](), False
    for name, result in results(names, device, small, seconds):
        if not name:
            file = out / f"gpu-check-{result['place']}{'-small' if small else ''}.json"
            kept = json.loads(file.read_text()) if file.exists() else {"sections": {}}
            kept["environment"] = result["environment"]
            continue
        bad = bad or result["verdict"] in ("wrong", "error")
        if result["verdict"] != "not run":
            kept.setdefault("sections", {})[name] = {**result, "at": time.strftime("%F %T")}
        print(f"{name:9s} {result['verdict']:8s} {result.get('seconds', 0):6.1f} s  {in_short(result)}", flush=True)
        out.mkdir(exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written to {file}")
    return int(bad)


if __name__ == "__main__":
    main()
