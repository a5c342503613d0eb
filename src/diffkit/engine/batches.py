"""Training batches: which images, how cropped, mirrored and labelled, as a function of the position in the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.core.random import Purpose, permutation, uniform
from diffkit.engine.codec import decode
from diffkit.engine.labels import dropped, fields, vectors
from diffkit.interfaces import ImageSpec

Task: TypeAlias = Callable[[Tensor, Callable[[int], Tensor], "Tensor | None"], Tensor]


class Images(Protocol):
    """What training needs of a prepared data set (`diffkit.engine.store.Store`)."""

    @property
    def count(self) -> int: ...

    def gather(
        self, indices: npt.NDArray[np.int64], part: str = "train"
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]: ...

    def column(self, kind: str, indices: npt.NDArray[np.int64], part: str = "train") -> npt.NDArray[Any] | None: ...


@dataclass(frozen=True)
class Batch:
    """stored uint8 [B, H, W, C], label float32 [B, K], positions int64 [B], paired inputs uint8 [B, H, W, C'].

    All on the CPU, but for pictures of a data set that is kept on the device; label and inputs may be None. `task`
    makes the conditioning image, once on the device.
    """

    stored: Tensor
    label: Tensor | None
    positions: Tensor
    inputs: Tensor | None = None
    task: Task | None = None
    seed: int = 0

    def pinned(self) -> Batch:
        """In page-locked memory, from which copies to a GPU do not wait."""
        return self._each(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` images."""

        def piece(start: int) -> Batch:
            return self._each(lambda tensor: tensor[start : start + size])

        return [piece(start) for start in range(0, len(self.positions), size)]

    def to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """clean [B, C, H, W] in [-1, 1], the condition, and positions, on the device."""
        there = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        clean = decode(there.stored)
        condition = {} if there.label is None else {"label": there.label}
        if self.task is not None:
            shown = clean if there.inputs is None else decode(there.inputs)
            condition["image"] = self.task(
                shown, lambda count: uniform(self.seed, Purpose.TASK, there.positions, count), None
            )
        return clean, condition, there.positions

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        label, inputs = (None if tensor is None else change(tensor) for tensor in (self.label, self.inputs))
        return Batch(change(self.stored), label, change(self.positions), inputs, self.task, self.seed)


@dataclass(frozen=True)
class Batches:
    """The endless stream of training images; `spec` gives the size of the crops, `task` the conditioning image.

    `resident`: what `diffkit.engine.resident` keeps on the device, by kind; the rest is read from `images`.
    """

    images: Images
    spec: ImageSpec
    seed: int
    flip: bool
    label_dropout: float
    task: Task | None = None
    resident: Mapping[str, Tensor] = field(default_factory=dict)

    def batch(self, first: int, count: int, pinned: bool = False) -> Batch:
        """The images at positions first ... first + count - 1 of the stream; pinned: ready to be sent to a GPU."""
        positions = torch.arange(first, first + count)
        indices = self._indices(positions)
        columns = {"labels": self.spec.classes, "attributes": self.spec.attributes}
        classes, values = (self.images.column(kind, indices) if there else None for kind, there in columns.items())
        stored = self._pictures("images", indices, positions)
        assert stored is not None
        batch = Batch(
            stored,
            self._label(vectors(self.spec, classes, values), positions),
            positions,
            None if self.task is None else self._pictures("inputs", indices, positions),
            self.task,
            self.seed,
        )
        return batch.pinned() if pinned else batch

    def _pictures(self, kind: str, indices: npt.NDArray[np.int64], positions: Tensor) -> Tensor | None:
        """Cropped and mirrored, an image and its pair alike; None of a kind that the set does not have."""
        stored, rows = self.resident.get(kind), torch.from_numpy(indices)
        if stored is None:
            read = self.images.column(kind, indices)
            if read is None:
                return None
            stored, rows = torch.from_numpy(read), torch.arange(len(read))
        height, width = self.spec.height, self.spec.width
        spare = torch.tensor([stored.shape[1] - height, stored.shape[2] - width])
        corners = torch.zeros(len(rows), 2, dtype=torch.int64)
        if spare.any():
            corners = (uniform(self.seed, Purpose.CROP, positions, 2) * (spare + 1)).long()
        mirrored = uniform(self.seed, Purpose.FLIP, positions)[:, 0] < 0.5 if self.flip else None
        return pieces(stored, rows, corners, mirrored, (height, width))

    def _indices(self, positions: Tensor) -> npt.NDArray[np.int64]:
        """Every epoch visits every image once, in an order of its own."""
        epochs, places = positions // self.images.count, positions % self.images.count
        parts = [_order(self.seed, int(epoch), self.images.count)[places[epochs == epoch]] for epoch in epochs.unique()]
        indices: npt.NDArray[np.int64] = torch.cat(parts).numpy()
        return indices

    def _label(self, label: Tensor | None, positions: Tensor) -> Tensor | None:
        """Zeros for what is unknown of an image, and for what is dropped."""
        if label is None:
            return None
        draws = uniform(self.seed, Purpose.LABEL_DROPOUT, positions, 1 + fields(self.spec))
        return dropped(label, self.spec, draws, self.label_dropout)


def pieces(stored: Tensor, rows: Tensor, corners: Tensor, mirrored: Tensor | None, size: tuple[int, int]) -> Tensor:
    """Pieces of `size`, height and width, of the images in these rows of `stored` [N, H, W, C]: [B, h, w, C] there.

    corners [B, 2]: top and left of each piece; mirrored [B]: whether it is turned left to right.
    """
    height, width = size
    device = stored.device
    lines = corners[:, :1].to(device) + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(len(rows), -1)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None].to(device), columns.flip(1), columns)
    columns = columns + corners[:, 1:].to(device)
    return stored[rows.to(device)[:, None, None], lines[:, :, None], columns[:, None, :]]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return permutation(seed, epoch, count)
