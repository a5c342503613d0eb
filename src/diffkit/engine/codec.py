"""The way from stored values to [-1, 1] and back. Nothing else knows how pixels are stored."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_RANGE = 127.5


def decode(stored: Tensor) -> Tensor:
    """Stored images uint8 [N, H, W, C] -> float32 [N, C, H, W] in [-1, 1]."""
    return stored.permute(0, 3, 1, 2).to(torch.float32).div(HALF_RANGE).sub(1.0).contiguous()


def encode(images: Tensor) -> Tensor:
    """Images [N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]: rounded, and clamped where they overshoot."""
    levels = images.to(torch.float32).add(1.0).mul(HALF_RANGE).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
