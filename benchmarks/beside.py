"""A training beside another on the same processors, against half of its speed alone.

    python benchmarks/beside.py DATA

The tiny network on a small prepared set, as many threads as processors. Compared are OpenMP's threads as they wait by
default, and as the command line has them wait (or `--spins`). Speeds are images a second by the runs' own metrics. Each
round measures one alone and two together with each way of waiting. Writes results/beside.json.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import asked, processor, spread, write

from diffkit.durable import read_lines
from diffkit.engine.processors import SPINS

SECONDS, SKIPPED = 12, 0.3
LIBGOMP_DEFAULT = 300_000


def started(data: Path, run: Path, spins: int) -> subprocess.Popen[bytes]:
    network = ("--preset", "tiny", "--set", "backbone.width=16", "--batch-size", 8, "--precision", "float32")
    fixed = ("--device", "cpu", "--time", f"{SECONDS}s", "--validate-every", 0, "--preview-every", 0)
    command = [sys.executable, "-m", "diffkit", *map(str, ["train", data, "-o", run, *network, *fixed])]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["GOMP_SPINCOUNT"] = str(spins)
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def speeds(data: Path, count: int, spins: int) -> list[float]:
    """Images a second of each of `count` trainings at once."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(count)]
        for process in [started(data, run, spins) for run in runs]:
            assert process.wait() == 0
        found = []
        for run in runs:
            each = [record["images_per_second"] for record in read_lines(run / "metrics.jsonl")]
            later = each[int(SKIPPED * len(each)) :]
            found.append(len(later) / sum(1 / value for value in later))
        return found


def main() -> None:
    options = asked(data=True, rounds=3, spins=int(SPINS))
    alone: dict[int, list[float]] = {LIBGOMP_DEFAULT: [], options.spins: []}
    beside: dict[int, list[float]] = {spins: [] for spins in alone}
    for _ in range(options.rounds):
        for spins in alone:
            (one,) = speeds(options.data, 1, spins)
            two = statistics.mean(speeds(options.data, 2, spins))
            alone[spins].append(one)
            beside[spins].append(two)
            print(f"{spins} spins: alone {one:.0f}, beside another {two:.0f}: {2 * two / one:.2f} of half", flush=True)
    figures = {
        str(spins): {
            "alone": spread(alone[spins]),
            "beside": spread(beside[spins]),
            "of_half": spread([2 * two / one for one, two in zip(alone[spins], beside[spins], strict=True)]),
        }
        for spins in alone
    }
    best = max(statistics.median(values) for values in alone.values())
    cost = 1 - statistics.median(alone[options.spins]) / statistics.median(alone[LIBGOMP_DEFAULT])
    of_best = 2 * statistics.median(beside[options.spins]) / best
    write(
        "beside",
        {"processor": processor(), "seconds": SECONDS, "cost_alone": round(cost, 3), "of_best_half": round(of_best, 3)}
        | {"spins": figures, "command_line": options.spins},
    )


if __name__ == "__main__":
    main()
