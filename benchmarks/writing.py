"""What writing samples durably costs: each file on its own, against groups of them as `diffkit sample` has it.

    python benchmarks/writing.py [RUN] [--count 2000] [--size 32] [--rounds 5] [--where .]

PNG files of random pixels by four threads, in turns: only encoded; each written, synced and renamed with its folder
synced (`durable.write_bytes`); and by `diffkit.engine.publishing`. With a RUN, also the whole command that makes as
many samples of it in one step. All that is written goes with the end. Writes results/writing.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import spread, write

from diffkit import durable
from diffkit.engine.pictures import png
from diffkit.engine.publishing import WRITERS, Publisher

BATCH = 64


def only_encoded(pixels: Any, folder: Path) -> None:
    with ThreadPoolExecutor(WRITERS) as threads:
        deque(threads.map(png, pixels), maxlen=0)


def each_on_its_own(pixels: Any, folder: Path) -> None:
    with ThreadPoolExecutor(WRITERS) as threads:
        names = (folder / f"{number:06d}.png" for number in range(len(pixels)))
        deque(threads.map(lambda path, image: durable.write_bytes(path, png(image)), names, pixels), maxlen=0)


def in_groups(pixels: Any, folder: Path) -> None:
    with Publisher(lambda paths: None) as publisher:
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH]
            publisher.put({folder / f"{start + n:06d}.png": partial(png, image) for n, image in enumerate(batch)})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, default=Path(), help="a folder on the disk to be measured")
    options = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (options.count, options.size, options.size, 3), np.uint8)
    ways: dict[str, Callable[[Any, Path], None]] = {
        "only encoded": only_encoded,
        "each on its own": each_on_its_own,
        "in groups": in_groups,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    whole: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.where) as place:  # ext4 is slow to reuse what was deleted a moment ago
        for number in range(options.rounds):
            for name, way in ways.items():
                folder = Path(place) / f"{name} {number}"
                folder.mkdir()
                start = time.perf_counter()
                way(pixels, folder)
                seconds[name].append(time.perf_counter() - start)
            if options.run is not None:
                words = [
                    "sample",
                    str(options.run),
                    "-o",
                    f"{place}/{number}",
                    "-n",
                    str(options.count),
                    "--steps",
                    "1",
                ]
                start = time.perf_counter()
                subprocess.run([sys.executable, "-m", "diffkit", *words], check=True, stderr=subprocess.DEVNULL)
                whole.append(time.perf_counter() - start)
            print(number, {name: round(values[-1], 2) for name, values in seconds.items()}, whole[-1:], flush=True)
    each = {name: spread([1e3 * value / options.count for value in values]) for name, values in seconds.items()}
    figures: dict[str, Any] = {"count": options.count, "size": options.size, "milliseconds_a_file": each}
    ratios = [old / new for old, new in zip(seconds["each on its own"], seconds["in groups"], strict=True)]
    figures["groups_are_faster_by"] = spread(ratios)
    if whole:
        figures["command_seconds"] = spread(whole)
    write("writing", figures)


if __name__ == "__main__":
    main()
