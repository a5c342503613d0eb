"""Noise schedules: increasing functions from t in (0, 1) to s, the ratio of noise to signal; log-SNR = -2 log s.

Only the shape of a schedule matters: `over_range` carries it onto the model's own range of noise levels. As a quantile
function it is the density of training noise levels; over an even grid of t it is a sampling grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Shape = Callable[[Tensor], Tensor]


def cosine(t: Tensor) -> Tensor:
    """Cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol and Dhariwal 2021, eq. 17, no offset)."""
    return torch.tan(t * (math.pi / 2))


def linear(t: Tensor, *, beta_min: float = 0.1, beta_max: float = 20.0) -> Tensor:
    """Betas that grow linearly with t (Ho et al. 2020; Song et al. 2021, eq. 33)."""
    return torch.expm1(t * (beta_min + (beta_max - beta_min) / 2 * t)).sqrt()


def sigmoid(t: Tensor, *, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Tensor:
    """alpha^2 falls along a sigmoid from `start` to `end`, tempered by `tau` (Jabri et al. 2022, algorithm 3)."""
    low, high, at = (torch.sigmoid(x / tau) for x in (t * 0 + start, t * 0 + end, start + t * (end - start)))
    return ((at - low) / (high - at)).sqrt()


def flow(t: Tensor) -> Tensor:
    """Rectified flow: x = (1 - t) clean + t noise (Liu et al. 2022, eq. 1)."""
    return t / (1 - t)


def karras(t: Tensor, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Evenly spaced in the rho-th root of s (Karras et al. 2022, eq. 5)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.pow(low + t * (high - low), rho)


def lognormal(t: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """log s is normal: EDM's training density (Karras et al. 2022, table 1).

    Logit-normal flow times (Esser et al. 2024, eq. 19) are the same family, since log s = logit of the flow time.
    """
    return torch.exp(mean + std * torch.special.ndtri(t))


def loglinear(t: Tensor, *, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Evenly spaced in log s, that is in log-SNR."""
    return torch.exp(math.log(sigma_min) + t * math.log(sigma_max / sigma_min))


def over_range(schedule: Shape, s_min: float, s_max: float, shift: float = 1.0) -> Shape:
    """The schedule, multiplied by `shift`, carried onto [s_min, s_max]: defined on [0, 1], reaching both ends.

    A schedule that goes beyond an end is restricted (as a density: truncated); one that stops short of it is stretched
    in log s, so that a network is trained wherever a sampler may go (and so an even schedule, shifted, stays even).
    t and the result are float64. Raises ValueError if the schedule lies wholly outside the range.
    """
    first, last = _inverse(schedule, s_min / shift), _inverse(schedule, s_max / shift)
    ends = (shift * schedule(torch.tensor([first, last], dtype=torch.float64))).log()
    low, high = math.log(s_min), math.log(s_max)
    if not ends[0] < ends[1]:
        raise ValueError(f"it has no noise level between {s_min:g} and {s_max:g}")

    def ranged(t: Tensor) -> Tensor:
        inner = (shift * schedule(first + t.double() * (last - first))).log()
        inner = low + (inner - ends[0]) * ((high - low) / (ends[1] - ends[0]))
        return inner.clamp(low, high).exp()

    return ranged


def _inverse(schedule: Shape, level: float, edge: float = 1e-9) -> float:
    """The t in [edge, 1 - edge] at which the schedule reaches `level` or comes nearest to it, by bisection."""
    low, high = edge, 1 - edge
    for _ in range(64):
        middle = (low + high) / 2
        if float(schedule(torch.tensor([middle], dtype=torch.float64))) < level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sampling_grid(schedule: Shape, steps: int, top: float = 1.0) -> list[float]:
    """`steps` noise levels falling from t = `top` of a ranged schedule, 1 being its highest, to its bottom; then 0."""
    t = top * (torch.linspace(1, 0, steps, dtype=torch.float64) if steps > 1 else torch.ones(1, dtype=torch.float64))
    return [*schedule(t).tolist(), 0.0]


def density(schedule: Shape, points: int = 4096) -> Callable[[Tensor], Tensor]:
    """How densely a ranged schedule trains each level: of log s, `s float64 [B] -> [B]`, by finite differences."""
    t = torch.linspace(0, 1, points + 1, dtype=torch.float64)
    known = schedule(t).log()

    @cache
    def tables(device: torch.device) -> tuple[Tensor, Tensor]:
        logs = known.to(device)
        return logs, 1 / (points * logs.diff().clamp(min=1e-12))

    def at(s: Tensor) -> Tensor:
        logs, rates = tables(s.device)
        places = torch.searchsorted(logs, s.log().contiguous()) - 1
        return rates[places.clamp(0, points - 1)]

    return at
