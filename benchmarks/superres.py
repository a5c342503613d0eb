"""Super-resolution against cubic interpolation, on the held-out images of the run's own data.

    python benchmarks/superres.py RUN [PICTURE.png]

Both start from the same images, `factor` times smaller and rounded to 8 bits. Measured: the distance between features
(KD-lite0 and FD-lite0 of the two sets; and, image by image, the mean distance of an image's features from those of its
original), PSNR, and PSNR after reducing again, which says whether what was known is still there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write
from PIL import Image

import diffkit
from diffkit.compose.reference import Reference, run_through
from diffkit.compose.wishes import Wishes
from diffkit.engine.inputs import Pictures, stored_pictures
from diffkit.engine.pictures import grid, psnr, save_png
from diffkit.engine.store import Store
from diffkit.measure.images import made
from diffkit.measure.scores import score

STEPS = (3, 15)


def reduced(images: np.ndarray, factor: int) -> np.ndarray:
    """Means over factor x factor pixels, as 8-bit images."""
    n, height, width, channels = images.shape
    means = images.reshape(n, height // factor, factor, width // factor, factor, channels).mean((2, 4))
    return means.round().astype(np.uint8)


def cubic(small: np.ndarray, factor: int) -> np.ndarray:
    size = (small.shape[2] * factor, small.shape[1] * factor)
    return np.stack([np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in small])


def main() -> None:
    run = Path(sys.argv[1])
    model = diffkit.load(run)
    assert model.settings.task is not None
    factor = int(model.settings.task.options["factor"])
    store = Store.open(model.settings.data.path)
    originals = stored_pictures(store, model.spec)
    real = np.stack([originals.read(index) for index in range(len(originals))])
    small = reduced(real, factor)
    shown = Pictures(originals.names, lambda index: small[index].repeat(factor, 0).repeat(factor, 1))
    ways = {"cubic": cubic(small, factor)}
    for steps in STEPS:
        ways[f"diffkit, {steps} steps"] = model.collect(model.plan(steps=steps), len(real), Wishes(inputs=shown))
    reference = Reference.of(model, None, "lite0")
    truth = run_through(reference.look_at(made(real, None, "originals")))
    figures: dict[str, Any] = {}
    for name, images in ways.items():
        features = run_through(reference.look_at(made(images, None, name)))
        paired = torch.linalg.vector_norm(features - truth, dim=1)
        again = reduced(images, factor)
        kernel, frechet = (score(metric, truth, features, reference.names) for metric in ("kid", "frechet"))
        figures[name] = {
            "kd": kernel.to_dict(),
            "fd": frechet.to_dict(),
            "feature_distance": round(float(paired.mean()), 4),
            "psnr": round(float(np.mean([psnr(a, b) for a, b in zip(real, images, strict=True)])), 2),
            "psnr_reduced": round(float(np.mean([psnr(a, b) for a, b in zip(small, again, strict=True)])), 2),
            "psnr_reduced_worst": round(min(psnr(a, b) for a, b in zip(small, again, strict=True)), 2),
        }
        print(name, figures[name])
    write("superres", {"factor": factor, "images": len(real), "images_seen": model.images_seen, "ways": figures})
    if len(sys.argv) > 2:
        some = np.linspace(0, len(real) - 1, 16).astype(int)
        columns = [small.repeat(factor, 1).repeat(factor, 2), *ways.values(), real]
        sheet = np.stack([column[some] for column in columns], 1).reshape(-1, *real.shape[1:])
        save_png(Path(sys.argv[2]), grid(sheet, 2 * len(columns)))


if __name__ == "__main__":
    main()
