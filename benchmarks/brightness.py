"""Do models keep the brightness of their data? One set, composited on white and on black, trained on each.

    python benchmarks/brightness.py FOLDER [--size 32] [--time 5m]

FOLDER holds images with transparency, so that the background can be chosen. Goal: the mean of 1,000 samples within
2/255 of the mean of the data, in every channel.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import write

import diffkit
from diffkit.engine.store import Store

IMAGES = 1000


def call(*command: object) -> None:
    subprocess.run([sys.executable, "-m", "diffkit", *map(str, command)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--size", default="32")
    parser.add_argument("--time", default="5m")
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    place = arguments.keep or Path(tempfile.mkdtemp())
    figures = {}
    for background in ("white", "black"):
        data, run = place / f"data-{background}", place / f"run-{background}"
        if not data.exists():
            options = ("--size", arguments.size, "--background", background, "--color", "color")
            call("prepare", arguments.folder, "-o", data, *options)
        call("train", data, "-o", run, "--time", arguments.time)
        store, model = Store.open(data), diffkit.load(run)
        made = model.sample(IMAGES).reshape(IMAGES, -1, 3).astype(np.float64).mean(1)
        wanted = (np.array(store.mean) + 1) * 127.5
        # The data's own spread says how far the mean of this many perfect samples would stray.
        real, _ = store.gather(np.arange(min(store.count, 5000)))
        noise = real.reshape(len(real), -1, 3).mean(1).std(0) / IMAGES**0.5
        figures[background] = {
            "data": wanted.round(2).tolist(),
            "samples": made.mean(0).round(2).tolist(),
            "difference": (made.mean(0) - wanted).round(2).tolist(),
            "standard_error": noise.round(2).tolist(),
            "images_seen": model.images_seen,
        }
        print(background, figures[background])
    write("brightness", {"images": IMAGES, "size": arguments.size, "time": arguments.time, "backgrounds": figures})


if __name__ == "__main__":
    main()
