"""The demo's figures: does a classifier trained on real images recognise the samples, and are they copies?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkit.durable import read_lines
from diffkit.engine.pictures import grid, save_png
from diffkit.engine.store import Store

Pixels = npt.NDArray[np.uint8]
Vectors = npt.NDArray[np.float64]


def recognise(data: Path, samples: Path, picture: Path) -> dict[str, Any]:
    """Judge the samples in folder `samples` by the prepared set `data`; needs scikit-learn.

    Writes `picture`: samples, and under each the nearest training image. Distances are Euclidean, over pixels in
    [0, 1]. Returns shares recognised, median distances to the nearest training image, and mean grey levels.
    """
    from sklearn.svm import SVC

    store = Store.open(data)
    train, labels = store.gather(np.arange(store.count))
    held, held_labels = store.gather(np.arange(store.holdout_count), "holdout")
    made, made_labels = _samples(samples, store.spec.classes)
    judge = SVC(gamma="scale", C=10.0).fit(_vectors(train), labels)
    nearest, distances = _nearest(_vectors(made), _vectors(train))
    shown = slice(0, 10)
    save_png(picture, grid(np.concatenate([made[shown], train[nearest[shown]]]), columns=10))
    return {
        "recognised_real": float(judge.score(_vectors(held), held_labels)),
        "recognised": float(judge.score(_vectors(made), made_labels)),
        "held_out": len(held),
        "samples": len(made),
        "distance": float(np.median(distances)),
        "distance_real": float(np.median(_nearest(_vectors(held), _vectors(train))[1])),
        "mean_grey": float(made.mean()),
        "mean_grey_real": float(train.mean()),
    }


def _samples(folder: Path, classes: tuple[str, ...]) -> tuple[Pixels, npt.NDArray[np.int64]]:
    records = read_lines(folder / "samples.jsonl")
    images = [np.asarray(Image.open(folder / record["file"])) for record in records]
    pixels = np.stack([image[..., None] if image.ndim == 2 else image for image in images])
    return pixels, np.array([classes.index(record["class"]) for record in records])


def _vectors(images: Pixels) -> Vectors:
    return images.reshape(len(images), -1) / 255.0


def _nearest(of: Vectors, among: Vectors) -> tuple[npt.NDArray[np.int64], Vectors]:
    """For each row the index of the nearest row of the other array, and its distance."""
    squares = (of**2).sum(1)[:, None] + (among**2).sum(1) - 2 * of @ among.T
    best = squares.argmin(1)
    return best, np.sqrt(np.maximum(squares[np.arange(len(of)), best], 0))
