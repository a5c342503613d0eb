"""Images larger than those a model was trained on: denoised tile by tile, the tiles overlapping."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffkit.interfaces import Denoise

Conditional = Callable[[Tensor, "float | Tensor", dict[str, Tensor]], Tensor]


def tiled(denoise: Conditional, condition: Mapping[str, Tensor], tile: tuple[int, int] | None) -> Denoise:
    """The denoiser under the condition; on tiles (height, width) unless None, mixed where they overlap.

    Tiles lie half a tile apart at most and weigh less towards their edges, at every noise level, so that they agree on
    one image (Bar-Tal et al. 2023, "MultiDiffusion", eq. 5). A conditioning image is cut like x.
    """
    fixed = dict(condition)
    if tile is None:
        return lambda x, s: denoise(x, s, fixed)
    height, width = tile
    window = _ramp(height)[:, None] * _ramp(width)

    def mixed(x: Tensor, s: float | Tensor) -> Tensor:
        weights = window.to(x)
        total, share = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for top in _starts(x.shape[-2], height):
            for left in _starts(x.shape[-1], width):
                at = (..., slice(top, top + height), slice(left, left + width))
                cut = {name: value[at] if value.dim() == 4 else value for name, value in fixed.items()}
                total[at] += weights * denoise(x[at], s, cut)
                share[at] += weights
        return total / share

    return mixed


def _starts(length: int, tile: int) -> list[int]:
    """Where tiles begin: evenly, at most half a tile apart, the last at the very end."""
    if length <= tile:
        return [0]
    count = -(-2 * (length - tile) // tile) + 1
    return [round(number * (length - tile) / (count - 1)) for number in range(count)]


def _ramp(length: int) -> Tensor:
    """Weights along one side: 1 in the middle, falling to nearly 0."""
    places = (torch.arange(length) + 0.5) / length
    return torch.minimum(places, 1 - places).mul(2).clamp(min=0.02)
