"""Averages of the weights over training."""

from __future__ import annotations

import torch
from torch import nn

WARM_UP = 0.05


def ema_decay(images_seen: int, batch: int, half_life: float) -> float:
    """The decay of one step of `batch` images, by which the average forgets half in `half_life` images.

    The half-life warms up: it is at most a twentieth of the images seen, so that early averages follow the weights
    and do not remember their random start (Karras et al. 2022, appendix F.2).
    """
    effective = min(half_life, WARM_UP * max(images_seen, 1))
    return float(0.5 ** (batch / effective))


@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the parameters of `average` towards those of `network`. Buffers are copied: never averaged."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)
    for target, source in zip(average.buffers(), network.buffers(), strict=True):
        target.copy_(source)
