"""The benchmarks of a GPU, in legs of which each takes about ten minutes or less: `make bench-gpu LEG=training`.

    python benchmarks/gpu_bench.py [--leg training] [--data SET] [--device cuda] [--wheels FOLDER] [--scratch FOLDER]

Without --leg all of them, one after the other. SET, a set prepared at 128x128, is for costs, backbones and quality. A
leg keeps what it has measured piece by piece; called again it does what is missing, so one that was cut off goes on.
Those of more than ten minutes (backbones, quality) take two or three calls of ten. Figures go into
results/LEG-cuda-MODEL.json, each model of GPU in a file of its own, and into docs/benchmarks.md.

diffkit is run from this checkout. WHEELS is a folder that `gpu_wheels.py` has filled: what cannot be imported here is
unpacked from there into SCRATCH (build/bench); nothing is installed. It also keeps images that are made to be measured.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu_wheels import ROOT, unpacked

DEMO, NEED_DATA = "demo", ("costs", "backbones", "quality")
LEGS = (DEMO, "training", "sampling", *NEED_DATA)


def command(leg: str, device: str, data: Path | None, scratch: Path) -> list[str]:
    """What a leg runs."""
    if leg == DEMO:
        return [sys.executable, "-m", "diffkit", "demo", "-o", str(scratch / "demo"), "--device", device]
    script = [sys.executable, str(ROOT / "benchmarks" / f"{leg}.py")]
    return [
        *script,
        *([str(data)] if leg in NEED_DATA else []),
        "--device",
        device,
        "--resume",
        "--scratch",
        str(scratch),
    ]


def environment(site: Sequence[Path]) -> dict[str, str]:
    """That of the commands: diffkit of this checkout, then what is installed, then what was unpacked."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT / "src", *site]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leg", choices=LEGS, action="append")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args()
    legs = options.leg or LEGS
    if options.data is None and (needing := [leg for leg in legs if leg in NEED_DATA]):
        parser.error(f"{', '.join(needing)} need a set prepared at 128x128: give --data.")
    options.scratch.mkdir(parents=True, exist_ok=True)
    site = [unpacked(options.wheels, options.scratch / "site")] if options.wheels else []
    failed = []
    for leg in legs:
        print(f"== {leg}", flush=True)
        words = command(leg, options.device, options.data, options.scratch)
        if subprocess.run(words, env=environment(site), check=False).returncode:
            failed.append(leg)
    if failed:
        raise SystemExit(f"Not all was measured: {', '.join(failed)}. The same command goes on from there.")


if __name__ == "__main__":
    main()
