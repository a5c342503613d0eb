"""Images per second of `diffkit prepare`, beside a plain Pillow loop in one process, in turns.

python benchmarks/prepare.py FOLDER
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import spread, write
from PIL import Image, ImageOps

from diffkit.datasets.folder import folder
from diffkit.engine.prepare import PrepareOptions, prepare

ROUNDS = 3
SIDE = 128


def plain_loop(source: str) -> int:
    """What one would write in a minute: open, orient, crop, resize, keep."""
    kept = []
    for example in folder(source):
        assert isinstance(example.image, Path)
        with Image.open(example.image) as image:
            kept.append(np.asarray(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (SIDE, SIDE))))
    with tempfile.TemporaryFile() as file:
        np.save(file, np.stack(kept))
    return len(kept)


def with_diffkit(source: str) -> int:
    with tempfile.TemporaryDirectory() as place:
        *_, finished = prepare(folder(source), Path(place) / "set", PrepareOptions(SIDE, SIDE))
        return int(finished.count + finished.holdout_count)


def main() -> None:
    if len(sys.argv) != 2:
        print("Skipped: give a folder of images.")
        return
    speeds: dict[str, list[float]] = {"diffkit": [], "plain loop": []}
    for _ in range(ROUNDS):
        for name, function in (("diffkit", with_diffkit), ("plain loop", plain_loop)):
            start = time.perf_counter()
            speeds[name].append(function(sys.argv[1]) / (time.perf_counter() - start))
    figures = {name: spread(values) for name, values in speeds.items()}
    ratio = figures["diffkit"]["median"] / figures["plain loop"]["median"]
    for name, figure in figures.items():
        print(f"{name:10} {figure['median']:.0f} img/s ({figure['min']:.0f} to {figure['max']:.0f})")
    print(f"ratio {ratio:.2f}")
    write("prepare", {"images_per_second": figures, "ratio": round(ratio, 3), "side": SIDE, "rounds": ROUNDS})


if __name__ == "__main__":
    main()
