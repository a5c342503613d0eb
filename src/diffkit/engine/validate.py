"""The held-out loss: how well the averaged network denoises images that it is not trained on.

Always the same images under the same noise, at the same noise levels, so that the curve over a training is smooth and
small changes mean something; and the same for as many training images, so that the gap is what was memorized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.random import Purpose, normal, uniform
from diffkit.engine.batches import Images, Task
from diffkit.engine.codec import decode
from diffkit.engine.distributed import ALONE, World
from diffkit.engine.gradients import Levels
from diffkit.engine.labels import vectors
from diffkit.engine.pieces import Pieces
from diffkit.interfaces import ImageSpec

LEVELS = 8
IMAGES = 64
GROWTH = 1.05


class SplitImages(Images, Protocol):
    """Images with a held-out part (`diffkit.engine.store.Store`)."""

    @property
    def holdout_count(self) -> int: ...


@dataclass(frozen=True)
class Validated:
    """Mean squared errors of the network's output at noise levels `levels`, of held-out and of training images."""

    images_seen: int
    levels: tuple[float, ...]
    holdout: tuple[float, ...]
    training: tuple[float, ...]

    @property
    def holdout_loss(self) -> float:
        return sum(self.holdout) / len(self.holdout)

    @property
    def training_loss(self) -> float:
        return sum(self.training) / len(self.training)

    @property
    def gap(self) -> float:
        """How much worse the held-out images fare, as a share of the training images' loss."""
        return self.holdout_loss / self.training_loss - 1

    def to_record(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        return {
            "images": self.images_seen,
            "holdout_loss": self.holdout_loss,
            "training_loss": self.training_loss,
            "levels": list(self.levels),
            "holdout_by_level": list(self.holdout),
            "training_by_level": list(self.training),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Validated:
        """The inverse of `to_record`."""
        columns = (tuple(record[key]) for key in ("levels", "holdout_by_level", "training_by_level"))
        return cls(record["images"], *columns)


class Validation:
    """Ready to measure: the images and the noise levels are chosen once."""

    def __init__(
        self,
        images: SplitImages,
        spec: ImageSpec,
        levels: Levels,
        seed: int,
        task: Task | None = None,
        world: World = ALONE,
        at_once: int = IMAGES,
    ) -> None:
        """At most 64 images of each part, spread over it; levels at the middles of eight equal shares of training's.

        `at_once`: images per pass of the network, or fewer if the memory does not hold them.
        """
        count = min(IMAGES, images.holdout_count, images.count)
        self.spec, self.seed, self.task, self.world = spec, seed, task, world
        self.pieces = Pieces(at_once)
        self.levels: Tensor = levels((torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS)
        self.parts = {part: self._gather(images, part, count) for part in ("holdout", "train")}

    def __call__(self, denoiser: Denoiser, images_seen: int) -> Validated:
        """`denoiser` wraps the network to be judged, in evaluation mode."""
        levels = tuple(self.levels.tolist())
        holdout, training = (self._losses(denoiser, part) for part in ("holdout", "train"))
        return Validated(images_seen, levels, holdout, training)

    def _gather(self, images: SplitImages, part: str, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Clean images [N, C, H, W], cropped at the centre, and their condition; on the CPU."""
        total = images.holdout_count if part == "holdout" else images.count
        indices = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
        stored, classes = images.gather(indices, part)
        values = images.column("attributes", indices, part) if self.spec.attributes else None
        label = vectors(self.spec, classes, values)
        clean = decode(self._centre(stored))
        condition = {} if label is None else {"label": label}
        if self.task is not None:
            inputs = images.column("inputs", indices, part)
            shown = clean if inputs is None else decode(self._centre(inputs))
            positions = torch.arange(count)
            condition["image"] = self.task(shown, lambda n: uniform(self.seed, Purpose.TASK, positions, n), None)
        return clean, condition

    def _centre(self, stored: npt.NDArray[np.uint8]) -> Tensor:
        top, left = (stored.shape[1] - self.spec.height) // 2, (stored.shape[2] - self.spec.width) // 2
        cropped = stored[:, top : top + self.spec.height, left : left + self.spec.width]
        return torch.from_numpy(np.ascontiguousarray(cropped))

    @torch.no_grad()
    def _losses(self, denoiser: Denoiser, part: str) -> tuple[float, ...]:
        device = next(denoiser.network.parameters()).device
        clean, condition = self.parts[part]
        clean, condition = clean.to(device), {name: tensor.to(device) for name, tensor in condition.items()}
        positions = torch.arange(len(clean), device=device)

        def loss(number: int) -> Tensor:
            s = self.levels[number]
            noise = normal(self.seed, Purpose.VALIDATION, positions, clean.shape[1:], number)

            def errors(some: slice) -> Tensor:
                shown = {name: tensor[some] for name, tensor in condition.items()}
                return squared_error(denoiser, clean[some], s.expand(len(clean[some])), noise[some], shown)

            return torch.cat([*self.pieces(errors, len(clean))]).mean()

        losses = torch.zeros(len(self.levels), device=device)
        for number in range(len(self.levels))[self.world.share(len(self.levels))]:
            losses[number] = loss(number)
        self.world.add([losses])
        return tuple(losses.tolist())


def due(before: int, now: int, every: int) -> bool:
    """Whether a point of validation lies after `before` images and not after `now`.

    The points are `every` images apart at least, and each a twentieth further on than the last: enough to see a turn
    of the curve, few enough to cost little, and a function of images seen alone. 0 = never.
    """
    if not every:
        return False
    point = every
    while point <= before:
        point = max(point + every, math.ceil(GROWTH * point))
    return point <= now
