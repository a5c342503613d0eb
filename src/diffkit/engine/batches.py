"""Training batches: which images, how cropped, mirrored and labelled, as a function of the position in the stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.core.random import Purpose, permutation, uniform
from diffkit.engine.codec import decode
from diffkit.interfaces import ImageSpec


class Images(Protocol):
    """What training needs of a prepared data set (`diffkit.engine.store.Store`)."""

    @property
    def count(self) -> int: ...

    def gather(
        self, indices: npt.NDArray[np.int64], part: str = "train"
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]: ...


@dataclass(frozen=True)
class Batch:
    """stored uint8 [B, H, W, C], label float32 [B, K] or None, positions int64 [B]; all on the CPU."""

    stored: Tensor
    label: Tensor | None
    positions: Tensor

    def pinned(self) -> Batch:
        """In page-locked memory, from which copies to a GPU do not wait."""
        label = None if self.label is None else self.label.pin_memory()
        return Batch(self.stored.pin_memory(), label, self.positions.pin_memory())

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` images."""
        labels = self.label.split(size) if self.label is not None else [None] * len(self.positions)
        pieces = zip(self.stored.split(size), labels, self.positions.split(size), strict=False)
        return [Batch(*piece) for piece in pieces]

    def to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """clean [B, C, H, W] in [-1, 1], the condition, and positions, on the device."""
        condition = {} if self.label is None else {"label": self.label.to(device, non_blocking=True)}
        clean = decode(self.stored.to(device, non_blocking=True))
        return clean, condition, self.positions.to(device, non_blocking=True)


@dataclass(frozen=True)
class Batches:
    """The endless stream of training images; `spec` gives the size of the crops."""

    images: Images
    spec: ImageSpec
    seed: int
    flip: bool
    label_dropout: float

    def batch(self, first: int, count: int, pinned: bool = False) -> Batch:
        """The images at positions first ... first + count - 1 of the stream; pinned: ready to be sent to a GPU."""
        positions = torch.arange(first, first + count)
        stored, classes = self.images.gather(self._indices(positions))
        stored = self._cropped(stored, positions)
        if self.flip:
            mirrored = (uniform(self.seed, Purpose.FLIP, positions)[:, 0] < 0.5).numpy()
            stored[mirrored] = stored[mirrored, :, ::-1]
        batch = Batch(torch.from_numpy(stored), self._label(classes, positions), positions)
        return batch.pinned() if pinned else batch

    def _indices(self, positions: Tensor) -> npt.NDArray[np.int64]:
        """Every epoch visits every image once, in an order of its own."""
        epochs, places = positions // self.images.count, positions % self.images.count
        parts = [_order(self.seed, int(epoch), self.images.count)[places[epochs == epoch]] for epoch in epochs.unique()]
        indices: npt.NDArray[np.int64] = torch.cat(parts).numpy()
        return indices

    def _cropped(self, stored: npt.NDArray[np.uint8], positions: Tensor) -> npt.NDArray[np.uint8]:
        height, width = self.spec.height, self.spec.width
        spare = stored.shape[1] - height, stored.shape[2] - width
        if spare == (0, 0):
            return stored
        where = uniform(self.seed, Purpose.CROP, positions, 2) * torch.tensor([spare[0] + 1, spare[1] + 1])
        corners = where.long().tolist()
        pieces = [image[y : y + height, x : x + width] for image, (y, x) in zip(stored, corners, strict=True)]
        return np.stack(pieces)

    def _label(self, classes: npt.NDArray[np.int64] | None, positions: Tensor) -> Tensor | None:
        """One-hot; zeros for images that have none and for those whose label is dropped."""
        if classes is None or not self.spec.classes:
            return None
        kept = uniform(self.seed, Purpose.LABEL_DROPOUT, positions)[:, 0] >= self.label_dropout
        return one_hot(torch.from_numpy(classes), self.spec.label_width) * kept[:, None]


def one_hot(classes: Tensor, width: int) -> Tensor:
    """int64 [B] -> float32 [B, width]; negative = no label = zeros."""
    return (classes[:, None] == torch.arange(width)).float()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return permutation(seed, epoch, count)
