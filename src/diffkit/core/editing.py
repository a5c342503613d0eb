"""Editing with a model as it is: a part of the image kept, and samplers that go over a stretch again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffkit.interfaces import Denoise, Noise

STRETCH = 2


def kept(denoise: Denoise, source: Tensor, mask: Tensor) -> Denoise:
    """The source wherever the mask [B, 1, H, W] is 0, so that a sampler leads exactly there (inpainting).

    Of what is known the clean image is known: with the ODE, x = source + s * noise there at every level, which is what
    RePaint draws anew at each step (Lugmayr et al. 2022, eq. 8).
    """

    def known(x: Tensor, s: float | Tensor) -> Tensor:
        return source.lerp(denoise(x, s), mask)

    return known


def resampled(sampler: Callable[..., Iterator[Tensor]], times: int) -> Callable[..., Iterator[Tensor]]:
    """A sampler that goes over each two steps `times` times, with the noise between put back: what is made anew gets to
    fit what is kept (Lugmayr et al. 2022, algorithm 1)."""

    def again(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
        ends = [*range(0, len(sigmas) - 1, STRETCH), len(sigmas) - 1]
        for first, last in pairwise(ends):
            stretch = sigmas[first : last + 1]
            for passed in range(times):
                states = list(sampler(denoise, x, stretch, noise))
                x = states[-1]
                if passed + 1 < times:
                    s, s_next = stretch[0], stretch[-1]
                    x = x + math.sqrt(s**2 - s_next**2) * noise(s_next, s)
            yield from states

    return again


def between(one: Tensor, other: Tensor, share: float) -> Tensor:
    """From one noise [C, H, W] to another along the sphere, so that what lies between is as strong (Shoemake 1985)."""
    a, b = one.flatten().double(), other.flatten().double()
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if float(angle) < 1e-4:
        return one.lerp(other, share)
    first, second = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
    return first.float() * one + second.float() * other


def adds_noise(sampler: Callable[..., Iterator[Tensor]]) -> bool:
    """Whether a sampler asks for noise on its way down, so that it cannot be run backwards; found by trying."""
    asked = []

    def noise(s: float, s_next: float) -> Tensor:
        asked.append(s)
        return torch.zeros(1, 1, 1, 1)

    for _ in sampler(lambda x, s: torch.zeros_like(x), torch.ones(1, 1, 1, 1), [4.0, 2.0, 1.0, 0.5], noise):
        pass
    return bool(asked)
