"""Samplers: from noise to images, down a list of noise levels, along dx/ds = (x - D(x, s)) / s.

Each is a generator `(denoise, x, sigmas, noise, *, options)` that yields x after every step. `sigmas` is strictly
monotone and may end at 0; `noise(s, s_next)` has unit variance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from diffkit.interfaces import Denoise, Noise


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """First order, one network call a step: Euler's method in s, which is DDIM (Song et al. 2021, eq. 13)."""
    for s, s_next in pairwise(sigmas):
        x = denoise(x, s).lerp(x, s_next / s)
        yield x


def ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Tensor]:
    """DDIM with fresh noise after every step; eta = 1 is DDPM's ancestral sampling, 0 is euler.

    Song et al. 2021, "Denoising diffusion implicit models", eq. 16, in the coordinate s = sigma / alpha.
    """
    for s, s_next in pairwise(sigmas):
        up = min(s_next, eta * s_next * math.sqrt(max(s**2 - s_next**2, 0.0)) / s)
        x = denoise(x, s).lerp(x, math.sqrt(s_next**2 - up**2) / s)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield x


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Second order, two network calls a step, one for a step to 0 (Karras et al. 2022, algorithm 1)."""
    for s, s_next in pairwise(sigmas):
        slope = (x - denoise(x, s)) / s
        ahead = x + (s_next - s) * slope
        if s_next > 0:
            slope = (slope + (ahead - denoise(ahead, s_next)) / s_next) / 2
            ahead = x + (s_next - s) * slope
        x = ahead
        yield x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M): second order, one network call a step (Lu et al. 2022, algorithm 2).

    The first step, and a step to 0, are of first order.
    """
    before: tuple[Tensor, float] | None = None
    for s, s_next in pairwise(sigmas):
        clean = denoise(x, s)
        target = clean
        if before is not None and s_next > 0:
            previous, s_before = before
            # Half the ratio of the coming step to the last one, in log s.
            target = clean + (clean - previous) * (math.log(s / s_next) / math.log(s_before / s) / 2)
        before = (clean, s)
        x = target.lerp(x, s_next / s)
        yield x
