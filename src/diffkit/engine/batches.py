"""Training batches: which images, how cropped, mirrored and labelled, as a function of the position in the stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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

    @property
    def spec(self) -> ImageSpec: ...

    def gather(
        self, indices: npt.NDArray[np.int64], part: str = "train"
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]: ...

    def column(self, kind: str, indices: npt.NDArray[np.int64], part: str = "train") -> npt.NDArray[Any] | None: ...


@dataclass(frozen=True)
class Batch:
    """positions int64 [B], label float32 [B, K], and pictures by kind: uint8 [B, H, W, C], all on the CPU.

    Pictures are "images" and, of pairs, "inputs". Of a data set that is kept on the device (`resident`) they are cut
    out there, at `places` int64 [B, 4]: row, top, left, and 1 where mirrored; `size`: their height and width. label
    may be None. `task` makes the conditioning image, once on the device.
    """

    positions: Tensor
    label: Tensor | None
    pictures: Mapping[str, Tensor]
    places: Tensor
    size: tuple[int, int]
    resident: Mapping[str, Tensor]
    task: Task | None = None
    seed: int = 0

    @property
    def stored(self) -> Tensor:
        """The images, on whichever device they are."""
        return self._picture("images", self.positions.device)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds but what the device keeps anyway."""
        label = () if self.label is None else (self.label,)
        return (self.positions, *label, *self.pictures.values(), self.places)

    def holding(self, tensors: Sequence[Tensor]) -> Batch:
        """Such a batch of other `tensors`, in their order."""
        rest = iter(tensors)
        return self._each(lambda _: next(rest))

    def pinned(self) -> Batch:
        """In page-locked memory, from which copies to a GPU do not wait."""
        return self._each(lambda tensor: tensor.pin_memory())

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` images."""

        def piece(start: int) -> Batch:
            return self._each(lambda tensor: tensor[start : start + size])

        return [piece(start) for start in range(0, len(self.positions), size)]

    def to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """clean [B, C, H, W] in [-1, 1], the condition, and positions, on the device. Never waits for it."""
        clean = decode(self._picture("images", device))
        positions = self.positions.to(device, non_blocking=True)
        condition = {} if self.label is None else {"label": self.label.to(device, non_blocking=True)}
        if self.task is not None:
            paired = "inputs" in self.pictures or "inputs" in self.resident
            shown = decode(self._picture("inputs", device)) if paired else clean
            condition["image"] = self.task(
                shown, lambda count: uniform(self.seed, Purpose.TASK, positions, count), None
            )
        return clean, condition, positions

    def _picture(self, kind: str, device: torch.device) -> Tensor:
        if kind not in self.resident:
            return self.pictures[kind].to(device, non_blocking=True)
        kept = self.resident[kind]
        return pieces(kept, self.places.to(kept.device, non_blocking=True), self.size)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            positions=change(self.positions),
            label=None if self.label is None else change(self.label),
            pictures={kind: change(tensor) for kind, tensor in self.pictures.items()},
            places=change(self.places),
        )


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
        indices = self.indices(positions)
        columns = {"labels": self.spec.classes, "attributes": self.spec.attributes}
        classes, values = (self.images.column(kind, indices) if there else None for kind, there in columns.items())
        batch = Batch(
            positions=positions,
            label=self._label(vectors(self.spec, classes, values), positions),
            pictures={},
            places=self._places(indices, positions),
            size=(self.spec.height, self.spec.width),
            resident=self.resident,
            task=self.task,
            seed=self.seed,
        )
        kinds = ("images",) if self.task is None else ("images", "inputs")
        batch = replace(batch, pictures=self._read(kinds, indices, batch))
        return batch.pinned() if pinned else batch

    def _read(self, kinds: Sequence[str], indices: npt.NDArray[np.int64], batch: Batch) -> dict[str, Tensor]:
        """Cropped and mirrored, an image and its pair alike: what the device does not keep."""
        read = {kind: self.images.column(kind, indices) for kind in kinds if kind not in self.resident}
        places = torch.cat([torch.arange(len(indices))[:, None], batch.places[:, 1:]], dim=1)
        return {
            kind: pieces(torch.from_numpy(found), places, batch.size)
            for kind, found in read.items()
            if found is not None
        }

    def _places(self, indices: npt.NDArray[np.int64], positions: Tensor) -> Tensor:
        """See `Batch`."""
        places = torch.zeros(len(indices), 4, dtype=torch.int64)
        places[:, 0] = torch.from_numpy(indices)
        stored = self.images.spec
        spare = torch.tensor([stored.height - self.spec.height, stored.width - self.spec.width])
        if spare.any():
            places[:, 1:3] = (uniform(self.seed, Purpose.CROP, positions, 2) * (spare + 1)).long()
        if self.flip:
            places[:, 3] = uniform(self.seed, Purpose.FLIP, positions)[:, 0] < 0.5
        return places

    def indices(self, positions: Tensor) -> npt.NDArray[np.int64]:
        """Which images these positions are: every epoch visits every image once, in an order of its own."""
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


def pieces(stored: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Pieces of `size`, height and width, of images [N, H, W, C]: [B, h, w, C] on their device.

    places int64 [B, 4], on the same device: row, top and left of each piece, and 1 where it is mirrored.
    """
    height, width = size
    rows, top, left, mirrored = places[:, :, None].unbind(1)
    lines = top + torch.arange(height, device=stored.device)
    columns = torch.arange(width, device=stored.device)
    columns = left + torch.where(mirrored > 0, columns.flip(0), columns)
    return stored[rows[:, :, None], lines[:, :, None], columns[:, None, :]]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> Tensor:
    return permutation(seed, epoch, count)
