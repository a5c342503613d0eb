"""How the kernels of `norm_kernels` are launched: what of an image each program takes, and in which order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from diffkit.backbones import norm_kernels

TILE = 4096  # numbers, 32 for each thread of four warps
FEWEST_CHANNELS = 64  # of a tile whose channels lie side by side: 128 bytes in bfloat16, a line of the cache
MOST_POSITIONS = 1024  # of a tile whose positions do
PARTS = 2048  # numbers of partial results that a program of the small kernels reads at a time


class Tiles(NamedTuple):
    """How images [B, C, H, W], dense with channels first or last, are cut; `P` and `C` are powers of two."""

    images: int
    positions: int
    channels: int
    last: bool
    P: int
    C: int

    @classmethod
    def of(cls, x: Tensor) -> Tiles:
        last = not x.is_contiguous()
        positions, channels = x.shape[2:].numel(), x.shape[1]
        most_positions, most_channels = triton.next_power_of_2(positions), triton.next_power_of_2(channels)
        if last:
            wide = min(FEWEST_CHANNELS, most_channels)
            return cls(len(x), positions, channels, last, min(TILE // wide, most_positions), wide)
        long = min(MOST_POSITIONS, most_positions)
        return cls(len(x), positions, channels, last, long, min(TILE // long, most_channels))

    @property
    def number(self) -> int:
        """Of tiles for the positions of one image."""
        return -(-self.positions // self.P)

    @property
    def grid(self) -> tuple[int, int]:
        return self.images * self.number, -(-self.channels // self.C)

    @property
    def strides(self) -> dict[str, int]:
        s_position, s_channel = (self.channels, 1) if self.last else (1, self.positions)
        return {"x_stride": self.positions * self.channels, "s_position": s_position, "s_channel": s_channel}

    @property
    def counts(self) -> dict[str, int]:
        return {"positions": self.positions, "channels": self.channels, "tiles": self.number}

    @property
    def shape(self) -> dict[str, int]:
        return {"P": self.P, "C": self.C}

    def parts(self, x: Tensor) -> Tensor:
        """Memory for two numbers of every tile and channel."""
        return x.new_empty(2, self.images, self.number, self.channels, dtype=torch.float32)

    def small(self, groups: int) -> dict[str, int]:
        """The shape of what the small kernels read at a time: tiles, and channels of a group."""
        wide = triton.next_power_of_2(self.channels // groups)
        return {"T": min(triton.next_power_of_2(self.number), max(1, PARTS // wide)), "D": wide}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in x's layout, the groups' mean and reciprocal deviation [2, B, groups], slopes and offsets [2, B, C]."""
    tiles, y = Tiles.of(x), torch.empty_like(x, dtype=dtype)
    part = tiles.parts(x)
    statistics = x.new_empty(2, tiles.images, groups, dtype=torch.float32)
    factors = x.new_empty(2, tiles.images, tiles.channels, dtype=torch.float32)
    shared: dict[str, Any] = {**tiles.strides, **tiles.counts, **tiles.shape}
    with torch.cuda.device_of(x):
        norm_kernels.moments[tiles.grid](x, part, half=part[0].numel(), **shared)
        norm_kernels.factors[(tiles.images * groups,)](
            part,
            weight,
            bias,
            weight if modulation is None else modulation,
            statistics,
            factors,
            eps,
            groups=groups,
            half=part[0].numel(),
            P=tiles.P,
            MODULATED=modulation is not None,
            **tiles.counts,
            **tiles.small(groups),
        )
        norm_kernels.apply[tiles.grid](x, y, factors, SILU=silu, **shared)
    return y, statistics, factors


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    statistics: Tensor,
    factors: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of weight and bias [2, C], and of `modulation` (empty if there is none)."""
    tiles, grad_x = Tiles.of(x), torch.empty_like(x)
    part, means = tiles.parts(x), torch.empty_like(statistics)
    grad_affine = torch.empty_like(factors)
    grad_modulation = x.new_empty(0) if modulation is None else torch.empty_like(modulation)
    shared: dict[str, Any] = {**tiles.strides, **tiles.counts, **tiles.shape, "groups": groups, "SILU": silu}
    with torch.cuda.device_of(x):
        norm_kernels.sums[tiles.grid](x, grad_y, statistics, factors, part, half=part[0].numel(), **shared)
        norm_kernels.small_gradients[(tiles.images * groups,)](
            part,
            weight,
            bias,
            weight if modulation is None else modulation,
            means,
            grad_affine,
            grad_modulation,
            groups=groups,
            half=part[0].numel(),
            MODULATED=modulation is not None,
            **tiles.counts,
            **tiles.small(groups),
        )
        norm_kernels.apply_backward[tiles.grid](x, grad_y, grad_x, statistics, factors, means, **shared)
    return grad_x, grad_affine.sum(1), grad_modulation
