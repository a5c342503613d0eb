"""A training beside another on the same processors, against half of its speed alone.

    python benchmarks/beside.py DATA

The `tiny` preset, as many threads as processors: as the command line chooses batch and precision, and a
quarter as wide with batches of 8 in float32, where a step is many short waits. Each with turns
(`diffkit.engine.turns`) and without, alone and two together in each round. Speeds are images a second by the runs' own
metrics. Writes results/beside.json.
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

SECONDS, SKIPPED = 20, 0.3
NETWORKS = {
    "default": (),
    "narrow": ("--set", "backbone.width=16", "--batch-size", 8, "--precision", "float32"),
}
COMMAND = {
    True: ("-m", "diffkit"),
    False: (
        "-c",
        "from diffkit.engine.turns import Turns; Turns.take = lambda self: None; from diffkit.cli import main; main()",
    ),
}


def started(data: Path, run: Path, network: str, turns: bool) -> subprocess.Popen[bytes]:
    fixed = ("--device", "cpu", "--time", f"{SECONDS}s", "--validate-every", 0, "--preview-every", 0)
    arguments = ["train", data, "-o", run, "--preset", "tiny", *NETWORKS[network], *fixed]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, *COMMAND[turns], *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def speeds(data: Path, count: int, network: str, turns: bool) -> list[float]:
    """Images a second of each of `count` trainings at once."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / str(number) for number in range(count)]
        for process in [started(data, run, network, turns) for run in runs]:
            assert process.wait() == 0
        found = []
        for run in runs:
            each = [record["images_per_second"] for record in read_lines(run / "metrics.jsonl")]
            later = each[int(SKIPPED * len(each)) :]
            found.append(len(later) / sum(1 / value for value in later))
        return found


def main() -> None:
    options = asked(data=True, rounds=3)
    rows = []
    for network in NETWORKS:
        for turns in (False, True):
            alone, beside = [], []
            for _ in range(options.rounds):
                alone += speeds(options.data, 1, network, turns)
                beside.append(statistics.mean(speeds(options.data, 2, network, turns)))
                print(f"{network}, turns {turns}: alone {alone[-1]:.0f}, beside {beside[-1]:.0f}", flush=True)
            of_half = [2 * two / one for one, two in zip(alone, beside, strict=True)]
            rows.append({"network": network, "turns": turns, "alone": spread(alone), "beside": spread(beside)})
            rows[-1]["of_half"] = spread(of_half)
    write("beside", {"processor": processor(), "seconds": SECONDS, "spins": int(SPINS), "rows": rows})


if __name__ == "__main__":
    main()
