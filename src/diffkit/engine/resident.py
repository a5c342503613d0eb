"""A prepared data set in the memory of the GPU: no batch is read, sent or waited for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffkit.engine.batches import Images
from diffkit.engine.devices import memory_bytes

SHARE = 0.2
"""Of the free memory that a data set may take; what is left is the training's."""
PIECE = 4096  # images


def resident(images: Images, kinds: Sequence[str], device: torch.device, budget: int | None) -> dict[str, Tensor]:
    """The training images of each kind ("images", "inputs"), uint8 [N, H, W, C] on the device.

    Empty if they are more than `budget` bytes, or if that is None: then they are read from the disk's cache.
    """
    found: dict[str, Tensor] = {}
    if budget is None:
        return found
    first = {kind: images.column(kind, np.zeros(1, np.int64)) for kind in kinds}
    rows = {kind: row for kind, row in first.items() if row is not None}
    if sum(row.nbytes for row in rows.values()) * images.count > budget:
        return found
    for kind, row in rows.items():
        found[kind] = torch.empty(images.count, *row.shape[1:], dtype=torch.uint8, device=device)
        for start in range(0, images.count, PIECE):
            indices = np.arange(start, min(start + PIECE, images.count))
            piece = images.column(kind, indices)
            assert piece is not None
            found[kind][start : start + len(indices)] = torch.from_numpy(piece)
    return found


def budget(device: torch.device) -> int | None:
    """Bytes of the device that a data set may take; None where the images lie in the same memory anyway."""
    memory = memory_bytes(device) if device.type == "cuda" else None
    return None if memory is None else int(SHARE * memory)
