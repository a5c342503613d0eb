"""Samplers that look back at earlier steps: second order and more at one network call a step.

All of them draw a polynomial through what the network has said so far and integrate it over the step. They differ in
what they draw it through, D or the slope (x - D) / s, and along which axis, s or log s.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffkit.interfaces import Denoise, Noise

ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[Tensor]:
    """DPM-Solver++(2M): second order, one network call a step (Lu et al. 2022, "DPM-Solver++", algorithm 2)."""
    return dpmpp_2m_sde(denoise, x, sigmas, noise, eta=0.0)


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, eta: float = 1.0
) -> Iterator[Tensor]:
    """dpmpp-2m with noise added in every step: eta = 1 follows the SDE of DDPM, 0 is dpmpp-2m.

    Lu et al. 2022, "DPM-Solver++", section 5 (SDE-DPM-Solver++(2M)); with eta as in Crowson's k-diffusion.
    """
    previous, h_before = x, math.inf
    for s, s_next in pairwise(sigmas):
        clean = denoise(x, s)
        if s_next == 0:
            yield clean
            return
        h, keep, up = _exponential(s, s_next, eta)
        target = clean + (clean - previous) * (h / h_before / 2) if h_before < math.inf else clean
        x = target.lerp(x, keep)
        if up > 0:
            x = x + up * noise(s, s_next)
        previous, h_before = clean, h
        yield x


def dpmpp_3m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, corrected: bool = False
) -> Iterator[Tensor]:
    """DPM-Solver++(3M), one network call a step (Lu et al. 2022, "DPM-Solver++", appendix B, and its published code).

    The published code halves the third-order term, which leaves it of second order; `corrected` is of third.
    """
    return dpmpp_3m_sde(denoise, x, sigmas, noise, eta=0.0, corrected=corrected)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    *,
    eta: float = 1.0,
    corrected: bool = False,
) -> Iterator[Tensor]:
    """dpmpp-3m with noise added in every step: eta = 1 follows the SDE of DDPM (Crowson's k-diffusion)."""
    answers: deque[Tensor] = deque(maxlen=3)
    lengths: deque[float] = deque(maxlen=2)
    for s, s_next in pairwise(sigmas):
        answers.appendleft(denoise(x, s))
        if s_next == 0:
            yield answers[0]
            return
        h, keep, up = _exponential(s, s_next, eta)
        # D(tau) = D + tau * slope + tau^2 * bend over the step, integrated against exp(-(1 - tau) (1 + eta) h).
        rate = h * (1 + eta) if h > 0 else h
        phi_2 = math.expm1(-rate) / rate + 1
        phi_3 = (phi_2 / rate - 0.5) * (2 if corrected else 1)
        x = answers[0].lerp(x, keep)
        if len(answers) == 2:
            x = x + (phi_2 * h / lengths[0]) * (answers[0] - answers[1])
        elif len(answers) == 3:
            near, far = lengths[0] / h, lengths[1] / h
            first, second = (answers[0] - answers[1]) / near, (answers[1] - answers[2]) / far
            x = x + phi_2 * first + ((phi_2 * near - phi_3) / (near + far)) * (first - second)
        if up > 0:
            x = x + up * noise(s, s_next)
        lengths.appendleft(h)
        yield x


def unipc(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: Literal[1, 2, 3] = 3
) -> Iterator[Tensor]:
    """UniPC: each network call corrects the step that led to it and predicts the next (Zhao et al. 2023, algorithms 1
    and 2, B_2(h)).

    One network call a step. Towards a grid's end at 0 the order falls, as in the published code.
    """
    answers: deque[Tensor] = deque(maxlen=order)
    start, used = x, 0
    for number, (s, s_next) in enumerate(pairwise(sigmas)):
        clean = denoise(x, s)
        if number:
            nodes = _log_nodes(sigmas, number - 1, used)
            weights = [0.5, 0.5] if used == 1 else interpolate([*nodes, 1.0], _rate(sigmas, number - 1))
            target = _sum(weights, [*list(answers)[:used], clean])
            x = target.lerp(start, s / sigmas[number - 1])
        answers.appendleft(clean)
        if s_next == 0:
            yield clean
            return
        left = len(sigmas) - 1 - number if sigmas[-1] == 0 else order
        used = min(len(answers), left)
        nodes = _log_nodes(sigmas, number, used)
        weights = [1 - 0.5 / nodes[1], 0.5 / nodes[1]] if used == 2 else interpolate(nodes, _rate(sigmas, number))
        start, x = x, _sum(weights, list(answers)[:used]).lerp(x, s_next / s)
        yield x


def deis(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: Literal[1, 2, 3, 4] = 3
) -> Iterator[Tensor]:
    """DEIS, the polynomial in log s: one network call a step (Zhang and Chen 2023, section 3.2, "tAB-DEIS")."""

    def weights(number: int, used: int) -> list[float]:
        if sigmas[number + 1] == 0:
            return [1.0]
        return interpolate(_log_nodes(sigmas, number, used), -_rate(sigmas, number))

    return _adams(denoise, x, sigmas, order, weights)


def lms(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: Literal[1, 2, 3, 4] = 4
) -> Iterator[Tensor]:
    """Linear multistep, the polynomial in s itself (Adams and Bashforth on uneven steps; Crowson's k-diffusion).

    One network call a step.
    """

    def weights(number: int, used: int) -> list[float]:
        s, s_next = sigmas[number], sigmas[number + 1]
        return interpolate([(sigmas[number - back] - s) / (s_next - s) for back in range(used)], 0.0)

    return _adams(denoise, x, sigmas, order, weights)


def ipndm(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, *, order: Literal[1, 2, 3, 4] = 4
) -> Iterator[Tensor]:
    """Improved PNDM: Adams and Bashforth's fixed coefficients (Liu et al. 2022; Zhang and Chen 2023, section 3.3).

    One network call a step. On uneven steps, which are the rule, of second order only.
    """
    return _adams(denoise, x, sigmas, order, lambda _, used: [*ADAMS_BASHFORTH[used - 1]])


def _adams(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], order: int, weights: Callable[[int, int], list[float]]
) -> Iterator[Tensor]:
    """A weighted mean of the slopes so far, newest first; `weights(number of the step, how many slopes)`."""
    slopes: deque[Tensor] = deque(maxlen=order)
    for number, (s, s_next) in enumerate(pairwise(sigmas)):
        slopes.appendleft((x - denoise(x, s)) / s)
        x = x + (s_next - s) * _sum(weights(number, len(slopes)), slopes)
        yield x


def _exponential(s: float, s_next: float, eta: float) -> tuple[float, float, float]:
    """The length of a step in log s, the share of x that it keeps, and the deviation of the noise that it adds."""
    h = math.log(s / s_next)
    eta = eta if h > 0 else 0.0
    return h, math.exp(-(1 + eta) * h), s_next * math.sqrt(-math.expm1(-2 * eta * h))


def _rate(sigmas: Sequence[float], number: int) -> float:
    return math.log(sigmas[number] / sigmas[number + 1])


def _log_nodes(sigmas: Sequence[float], number: int, used: int) -> list[float]:
    """Where the last levels lie along the step in log s, which runs from 0 to 1: 0 and negative numbers."""
    rate = _rate(sigmas, number)
    return [math.log(sigmas[number] / sigmas[number - back]) / rate for back in range(used)]


def interpolate(nodes: Sequence[float], rate: float) -> list[float]:
    """Weights w of values at `nodes`, for the mean over (0, 1) of the polynomial through them under exp(rate * tau)."""
    return [*_interpolated(tuple(nodes), rate)]


@lru_cache(maxsize=1024)
def _interpolated(nodes: tuple[float, ...], rate: float) -> tuple[float, ...]:
    """They meet the moments: sum of w * node^k = mean of tau^k."""
    moments = [1.0]
    for power in range(1, len(nodes)):
        if rate == 0:
            moments.append(1 / (power + 1))
        else:
            moments.append(-1 / math.expm1(-rate) - power / rate * moments[-1])
    powers = torch.tensor(nodes, dtype=torch.float64) ** torch.arange(len(nodes))[:, None]
    return tuple(torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist())


def _sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], list(tensors)[1:], strict=False):
        total = total.add(tensor, alpha=weight)
    return total
