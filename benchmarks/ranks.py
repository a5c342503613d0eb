"""Two processes that share a training, against two that train on their own at the same time, on two CPU cores.

    python benchmarks/ranks.py DATA

One thread each, batch 32 for each process; images a second by the runs' own metrics. Writes results/ranks.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import spread, write

from diffkit.durable import read_lines

ROUNDS, SECONDS, SKIPPED = 3, 20, 5
NETWORK = "unet:width=64,multipliers=[1,2],blocks=1,attention=0,patch=2"


def started(data: str, run: Path, *options: object) -> subprocess.Popen[bytes]:
    fixed = ("--backbone", NETWORK, "--time", f"{SECONDS}s", "--validate-every", 0, "--preview-every", 0)
    command = ["train", data, "-o", run, "--device", "cpu", "--precision", "bfloat16", *fixed, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "diffkit", *map(str, command)], env=environment, stderr=-3)


def speed(run: Path) -> float:
    records = read_lines(run / "metrics.jsonl")
    return statistics.median([each["images_per_second"] for each in records if "images_per_second" in each][SKIPPED:])


def main() -> None:
    data, alone, shared = sys.argv[1], [], []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            runs = [Path(folder) / name for name in ("one", "other", "both")]
            for process in [started(data, run, "--batch-size", 32) for run in runs[:2]]:
                assert process.wait() == 0
            assert started(data, runs[2], "--batch-size", 64, "--gpus", 2).wait() == 0
            alone.append(speed(runs[0]) + speed(runs[1]))
            shared.append(speed(runs[2]))
        print(f"two alone {alone[-1]:.1f}, together {shared[-1]:.1f}: {shared[-1] / alone[-1]:.3f}", flush=True)
    ratios = [ours / theirs for ours, theirs in zip(shared, alone, strict=True)]
    write("ranks", {"alone": spread(alone), "together": spread(shared), "ratio": spread(ratios), "network": NETWORK})


if __name__ == "__main__":
    main()
