"""New images by a model, as a set that can be measured."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffkit.compose.model import Model
from diffkit.compose.reference import Working, own_data
from diffkit.compose.wishes import Wishes, class_labels

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from diffkit.engine.inputs import Pictures
    from diffkit.engine.sample import Plan
    from diffkit.measure.images import ImageSet


ADDED = 512  # images in a message


@dataclass(frozen=True)
class Sampled:
    """New images, the network calls that each took, and the seconds that all took."""

    images: ImageSet
    calls: int
    seconds: float


def sampled(
    model: Model, plan: Plan, count: int, labels: Sequence[str | None] | None
) -> Generator[Working, None, Sampled]:
    """Make `count` images, kept in a file that vanishes; yields progress. The model's world shares the work.

    `labels`: the classes of real images, in whose proportions the samples' classes are taken.
    """
    import torch

    from diffkit.measure.images import made

    spec = model.spec
    classes = _proportional(labels, count) if spec.classes and labels else None
    wishes = Wishes(class_labels(spec, classes), inputs=own_inputs(model) if spec.image_channels else None)
    pixels = _storage((count, spec.height, spec.width, spec.channels))
    calls, begun = 0, time.perf_counter()
    own = range(count)[model.world.share(count)]
    for batch in model.generate(plan, own, wishes):
        pixels[batch.indices] = batch.pixels
        calls = batch.calls
        yield Working("Sampling", min(count, (batch.indices[-1] + 1 - own.start) * model.world.size), count)
    if model.world.size > 1:
        model.world.add([torch.from_numpy(pixels[start : start + ADDED]) for start in range(0, count, ADDED)])
    return Sampled(made(pixels, classes, "the samples"), calls, time.perf_counter() - begun)


def _storage(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Room for images: in a temporary file that has its space already, or in memory where there is none on the disk."""
    import numpy as np

    try:
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return np.memmap(file, np.uint8, "w+", shape=shape)
    except OSError:
        return np.zeros(shape, np.uint8)


def own_inputs(model: Model) -> Pictures:
    """The images that a model of a task is measured with: those it was prepared with, held-out ones if there are some.

    Raises DiffkitError if the data are gone.
    """
    from diffkit.engine.inputs import stored_pictures
    from diffkit.engine.store import Store

    return stored_pictures(Store.open(own_data(model)), model.spec)


def _proportional(labels: Sequence[str | None], count: int) -> list[str | None]:
    """`count` labels that are distributed as these, spread evenly."""
    ordered = sorted(labels, key=lambda label: label or "")
    return [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
