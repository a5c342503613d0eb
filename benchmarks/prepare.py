"""Images per second of `diffkit prepare`, beside a plain Pillow loop in one process, in turns.

    python benchmarks/prepare.py FOLDER [--rounds 3] [--before COMMIT]

Each round in a process of its own, beginning with the function called; the better of two calls counts, so that files
are read from memory. With another commit, that is a third way. Writes results/prepare.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import sources, spread, write
from PIL import Image, ImageOps

SIDE = 128
PLAIN = "plain loop"


def plain_loop(source: str) -> int:
    """What one would write in a minute: open, orient, crop, resize, keep."""
    from diffkit.datasets.folder import folder

    kept = []
    for example in folder(source):
        assert isinstance(example.image, Path)
        with Image.open(example.image) as image:
            kept.append(np.asarray(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIDE, SIDE))))
    with tempfile.TemporaryFile() as file:
        np.save(file, np.stack(kept))
    return len(kept)


def with_diffkit(source: str) -> int:
    """By the code on PYTHONPATH."""
    from diffkit.datasets.folder import folder
    from diffkit.engine.prepare import PrepareOptions, prepare

    with tempfile.TemporaryDirectory() as place:
        *_, finished = prepare(folder(source), Path(place) / "set", PrepareOptions(SIDE, SIDE))
        return int(finished.count + finished.holdout_count)


def one_round(name: str, source: str, code: Path) -> float:
    """Images a second."""
    command = [sys.executable, __file__, source, "--once", name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(code)}, capture_output=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", help="another commit, to compare with")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.folder:
        print("Skipped: give a folder of images.")
        return
    if options.once:
        function = plain_loop if options.once == PLAIN else with_diffkit
        speeds = []
        for _ in range(2):
            start = time.perf_counter()
            speeds.append(function(options.folder) / (time.perf_counter() - start))
        print(max(speeds))
        return
    with sources(options.before) as folders:
        ways = {**folders, PLAIN: folders["now"]}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, code in ways.items():
                found[name].append(one_round(name, options.folder, code))
            print({name: round(values[-1]) for name, values in found.items()}, flush=True)
    ratios = {
        f"now / {name}": spread([now / other for now, other in zip(found["now"], values, strict=True)])
        for name, values in found.items()
        if name != "now"
    }
    print(ratios)
    images = sum(len(files) for _, _, files in os.walk(options.folder))
    figures = {"images": images, "side": SIDE, "commit_before": options.before}
    write("prepare", {**figures, "images_per_second": {n: spread(v) for n, v in found.items()}, "ratios": ratios})


if __name__ == "__main__":
    main()
