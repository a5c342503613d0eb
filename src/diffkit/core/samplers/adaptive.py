"""A sampler that chooses its own steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffkit.interfaces import Denoise, Noise


def adaptive(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, tolerance: float = 0.02
) -> Iterator[Tensor]:
    """Third order, with as many steps between the levels as keep the error of each below the tolerance.

    Bogacki and Shampine 1989: three network calls a step, and an estimate of its error. `tolerance` is that of the
    finished image, whose values lie in [-1, 1]: what is wrong at level s shrinks by (1 + s^2)^1/2 on the way. Every
    image has steps of its own, so none depends on its company; for this the denoiser is given a level for each. The
    grid is only where it must land: two levels are enough.
    """
    slope, lengths = torch.empty(0), torch.full((len(x),), 0.5, dtype=torch.float64)
    for s, s_next in pairwise(sigmas):
        if s_next == 0:
            yield denoise(x, s)
            return
        if not len(slope):
            slope = (x - denoise(x, s)) / s
        at, sign = torch.full_like(lengths, math.log(s)), math.copysign(1.0, s_next - s)
        while bool((at != math.log(s_next)).any()):
            left = sign * (math.log(s_next) - at)
            # A rest that is nearly a step is made one.
            to = torch.where(lengths < 0.99 * left, at + sign * lengths, math.log(s_next))
            ahead, slope_ahead, error = _step(denoise, x, slope, at.exp(), to.exp())
            error = error.cpu().double() / (tolerance * (1 + at.exp().square()).sqrt())
            accepted = ~(error > 1)
            rows = accepted.to(x.device)[:, None, None, None]
            x, slope = torch.where(rows, ahead, x), torch.where(rows, slope_ahead, slope)
            grown = (to - at).abs() * (0.9 * error.clamp(min=1e-9) ** (-1 / 3)).clamp(0.2, 5.0)
            # A step cut short by a level says nothing against a longer one; who has arrived waits.
            grown = torch.where(accepted & (to == math.log(s_next)), grown.maximum(lengths), grown)
            lengths = torch.where(left == 0, lengths, grown)
            at = torch.where(accepted, to, at)
        yield x


def _step(denoise: Denoise, x: Tensor, slope: Tensor, s: Tensor, s_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From s to s_next, both [B]: x there, the slope there, and the estimated error [B] (root mean square)."""
    length = s_next - s
    h = length.to(x)[:, None, None, None]

    def at(share: float, x: Tensor) -> Tensor:
        level = s + share * length
        return (x - denoise(x, level)) / level.to(x)[:, None, None, None]

    second = at(1 / 2, x + h / 2 * slope)
    third = at(3 / 4, x + h * 3 / 4 * second)
    ahead = x + h / 9 * (2 * slope + 3 * second + 4 * third)
    last = at(1.0, ahead)
    error = h / 72 * (-5 * slope + 6 * second + 8 * third - 9 * last)
    return ahead, last, error.square().flatten(1).mean(1).sqrt()
