"""Labels as vectors: a class is one-hot, an attribute its value, in [-1, 1], and its presence; zeros = unknown."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.interfaces import Attribute, ImageSpec


def one_hot(classes: Tensor, width: int) -> Tensor:
    """int64 [B] -> float32 [B, width]; negative = no label = zeros."""
    return (classes[:, None] == torch.arange(width)).float()


def scaled(value: float, attribute: Attribute) -> float:
    """[low, high] to [-1, 1]."""
    return 2 * (value - attribute.low) / (attribute.high - attribute.low) - 1


def vectors(
    spec: ImageSpec, classes: npt.NDArray[np.int64] | None, values: npt.NDArray[np.float32] | None
) -> Tensor | None:
    """Class indices [B] (-1 = none) and attribute values [B, A] (NaN = unknown) -> float32 [B, K], None if K = 0."""
    columns = []
    if spec.classes:
        assert classes is not None
        columns.append(one_hot(torch.from_numpy(classes), len(spec.classes)))
    if spec.attributes:
        assert values is not None
        low, high = (torch.tensor([each[k] for each in spec.attributes], dtype=torch.float32) for k in (1, 2))
        given = torch.from_numpy(values)
        known = ~given.isnan()
        value = torch.where(known, 2 * (given - low) / (high - low) - 1, 0.0)
        columns.append(torch.stack([value, known.float()], dim=-1).flatten(1))
    return torch.cat(columns, dim=1) if columns else None


def dropped(label: Tensor, spec: ImageSpec, uniform: Tensor, share: float) -> Tensor:
    """The labels with all of it unknown in this share of rows, and each field of its own in this share of the others.

    `uniform` [B, 1 + fields]; the class is one field, each attribute another; a sole field is dropped only once.
    """
    kept = (uniform[:, :1] >= share).float()
    if fields(spec) == 1:
        return label * kept
    each = (uniform[:, 1:] >= share).float()
    widths = ([len(spec.classes)] if spec.classes else []) + [2] * len(spec.attributes)
    return label * kept * each.repeat_interleave(torch.tensor(widths), dim=1)


def fields(spec: ImageSpec) -> int:
    """How many things a label says."""
    return bool(spec.classes) + len(spec.attributes)
