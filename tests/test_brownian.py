"""The path of noise under the samplers: its increments, and the same picture at any number of steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from diffkit.core import schedules
from diffkit.core.brownian import Path
from diffkit.core.random import Purpose, normal, normals
from diffkit.core.schedules import over_range, sampling_grid
from parts import samplers


def draws(count: int) -> Path:
    return path(count, [80.0, 10.0, 1.0, 0.1, 0.01])


def path(count: int, sigmas: list[float]) -> Path:
    positions = torch.arange(count)
    return Path(lambda numbers: normals(0, Purpose.BROWNIAN, positions, (1, 1, 1), numbers), sigmas)


def test_increments_have_unit_variance_and_are_independent() -> None:
    grid = [80.0, 31.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.01]
    one = path(20_000, grid)
    found = torch.stack([one.noise(a, b).flatten() for a, b in itertools.pairwise(grid)])  # type: ignore[union-attr]
    correlation = torch.corrcoef(found)
    torch.testing.assert_close(found.var(1), torch.ones(len(found)), atol=0.05, rtol=0)
    assert float((correlation - torch.eye(len(found))).abs().max()) < 0.03


def test_the_order_in_which_it_is_asked_does_not_matter() -> None:
    intervals = [(80.0, 40.0), (40.0, 5.0), (5.0, 0.1), (80.0, 5.0)]
    forwards, backwards = draws(5), draws(5)
    a = [forwards.noise(*each) for each in intervals]
    b = [backwards.noise(*each) for each in reversed(intervals)]
    for one, other in zip(a, reversed(b), strict=True):
        torch.testing.assert_close(one, other)


def test_two_intervals_make_up_the_noise_of_both() -> None:
    """The clock is 1 / s^2; levels are rounded to at most a thirty-second of the smallest step."""
    whole, one, other = (draws(2_000).noise(*each) for each in ((40.0, 1.0), (40.0, 5.0), (5.0, 1.0)))
    assert whole is not None and one is not None and other is not None
    first, second = (math.sqrt(b**-2 - a**-2) for a, b in ((40.0, 5.0), (5.0, 1.0)))
    combined = (first * one + second * other) / math.sqrt(first**2 + second**2)
    assert float(torch.corrcoef(torch.stack([whole.flatten(), combined.flatten()]))[0, 1]) > 0.999


def test_an_interval_that_rises_or_has_no_length_is_not_on_the_path() -> None:
    one = draws(2)
    assert one.noise(1.0, 2.0) is None
    assert one.noise(1.0, 1.0) is None


@pytest.mark.parametrize("sampler", [samplers.dpmpp_2m_sde, samplers.dpmpp_3m_sde, samplers.ancestral])
def test_twenty_and_forty_steps_are_the_same_picture(sampler) -> None:  # type: ignore[no-untyped-def]
    """On data of two values (black and white) and on Gaussian data: along one path against along two."""

    def denoise(x: Tensor, s: float) -> Tensor:
        return torch.tanh(x / s**2)

    def made(steps: int, seed: int) -> Tensor:
        grid = sampling_grid(over_range(schedules.loglinear, 0.02, 40.0), steps)
        positions = torch.arange(2_000)
        along = Path(lambda numbers: normals(seed, Purpose.BROWNIAN, positions, (1, 1, 1), numbers), grid)
        x = 40 * normal(0, Purpose.START_NOISE, positions, (1, 1, 1))
        *_, result = sampler(denoise, x, grid, lambda s, s_next: along.noise(s, s_next))
        return result.flatten()

    a, b, other = made(20, 0), made(40, 0), made(40, 1)
    same, chance = float((a.sign() == b.sign()).float().mean()), float((a.sign() == other.sign()).float().mean())
    assert chance < 0.6
    assert same > 0.9
