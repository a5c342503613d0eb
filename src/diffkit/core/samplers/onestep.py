"""Samplers that remember nothing from step to step: of Runge-Kutta's kind."""

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
        down, up = split(s, s_next, eta)
        x = denoise(x, s).lerp(x, down / s)
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


def edm_stochastic(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    churn: float = 40.0,
    s_low: float = 0.05,
    s_high: float = 50.0,
    s_noise: float = 1.003,
) -> Iterator[Tensor]:
    """Heun's method with noise added before each step between s_low and s_high (Karras et al. 2022, algorithm 2).

    `churn` is S_churn, shared by the steps: each raises s by the factor 1 + churn / steps, at most by the root of 2;
    s_noise: deviation of the noise. Two network calls a step.
    """
    factor = 1 + min(churn / (len(sigmas) - 1), math.sqrt(2) - 1)
    for s, s_next in pairwise(sigmas):
        if factor > 1 and s_low <= s <= s_high and s_next < s:
            x = x + s_noise * math.sqrt((factor * s) ** 2 - s**2) * noise(s, factor * s)
            s = factor * s
        (x,) = heun(denoise, x, [s, s_next], noise)
        yield x


def dpm2(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """Second order, two network calls a step: the slope half way in log s (Lu et al. 2022, "DPM-Solver", algorithm 1;
    as in Crowson's k-diffusion)."""
    for s, s_next in pairwise(sigmas):
        clean = denoise(x, s)
        if s_next > 0:
            middle = math.sqrt(s * s_next)
            between = clean.lerp(x, middle / s)
            x = x + (s_next - s) / middle * (between - denoise(between, middle))
        else:
            x = clean
        yield x


def dpmpp_2s(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 0.0
) -> Iterator[Tensor]:
    """DPM-Solver++(2S): second order, two network calls a step (Lu et al. 2022, "DPM-Solver++", algorithm 1).

    eta above 0 adds noise after each step, as in `ancestral`.
    """
    for s, s_next in pairwise(sigmas):
        down, up = split(s, s_next, eta)
        clean = denoise(x, s)
        if down > 0:
            middle = math.sqrt(s * down)
            clean = denoise(clean.lerp(x, middle / s), middle)
        x = clean.lerp(x, down / s)
        if up > 0:
            x = x + up * noise(s, s_next)
        yield x


def split(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """The level to step down to, and the deviation of the noise that then leads up to s_next."""
    up = min(s_next, eta * s_next * math.sqrt(max(s**2 - s_next**2, 0.0)) / s)
    return math.sqrt(s_next**2 - up**2), up
