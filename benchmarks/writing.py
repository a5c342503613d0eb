"""What writing samples durably costs: each file on its own, against groups of them as `diffkit sample` has it.

    python benchmarks/writing.py [--count 2000] [--size 32] [--rounds 5] [--where .]

PNG files of random pixels by four threads, in turns: only encoded; each written, synced and renamed with its folder
synced (`durable.write_bytes`); and by `diffkit.engine.publishing`. On this disk, and on one of which each sync takes
some milliseconds longer. Writes results/writing.json.
"""

from __future__ import annotations

import argparse
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
LATENCIES = (0, 5)


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


def seconds(pixels: Any, rounds: int, where: Path) -> dict[str, list[float]]:
    """Of each way, in turns. Nothing is deleted before the end: ext4 is slow to reuse what was deleted a moment ago."""
    ways: dict[str, Callable[[Any, Path], None]] = {
        "only encoded": only_encoded,
        "each on its own": each_on_its_own,
        "in groups": in_groups,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=where) as place:
        for number in range(rounds):
            for name, way in ways.items():
                folder = Path(place) / f"{name} {number}"
                folder.mkdir()
                start = time.perf_counter()
                way(pixels, folder)
                found[name].append(time.perf_counter() - start)
            print(number, {name: round(values[-1], 2) for name, values in found.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, default=Path(), help="a folder on the disk to be measured")
    options = parser.parse_args()
    pixels = np.random.default_rng(0).integers(0, 256, (options.count, options.size, options.size, 3), np.uint8)
    figures: dict[str, Any] = {"count": options.count, "size": options.size, "added_to_a_sync": {}}
    real = durable.sync
    for milliseconds in LATENCIES:

        def late(descriptor: int, wait: float = milliseconds / 1e3) -> None:
            time.sleep(wait)
            real(descriptor)

        durable.sync = late if milliseconds else real
        found = seconds(pixels, options.rounds, options.where)
        each = {name: spread([1e3 * value / options.count for value in values]) for name, values in found.items()}
        ratios = [old / new for old, new in zip(found["each on its own"], found["in groups"], strict=True)]
        figures["added_to_a_sync"][f"{milliseconds} ms"] = {
            "milliseconds_a_file": each,
            "groups_are_faster_by": spread(ratios),
        }
    write("writing", figures)


if __name__ == "__main__":
    main()
