"""Noise schedules against closed forms and discrete definitions, and what the host does with them."""

from __future__ import annotations

import itertools
import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from diffkit.core import schedules
from diffkit.core.schedules import over_range, sampling_grid
from diffkit.testing import check_schedule

ALL = ["cosine", "linear", "sigmoid", "flow", "karras", "lognormal", "loglinear"]
T = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_every_schedule_keeps_the_contract(name: str) -> None:
    check_schedule(getattr(schedules, name))


def test_cosine_is_sigma_over_alpha_of_the_published_angles() -> None:
    s = schedules.cosine(T)
    alpha, sigma = torch.cos(T * math.pi / 2), torch.sin(T * math.pi / 2)
    torch.testing.assert_close(s, sigma / alpha, rtol=1e-12, atol=0)


def test_linear_is_the_limit_of_ddpm_with_many_small_betas() -> None:
    steps = 200_000
    betas = torch.linspace(0.1, 20.0, steps, dtype=torch.float64) / steps
    alpha_bar = torch.cumprod(1 - betas, 0)
    at = (T * steps).long() - 1
    expected = ((1 - alpha_bar[at]) / alpha_bar[at]).sqrt()
    torch.testing.assert_close(schedules.linear(T), expected, rtol=2e-3, atol=0)


def test_sigmoid_gives_the_published_gamma() -> None:
    start, end, tau = -3.0, 3.0, 1.0

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    for t in (0.1, 0.5, 0.9):
        low, high = sigmoid(start / tau), sigmoid(end / tau)
        gamma = (high - sigmoid((t * (end - start) + start) / tau)) / (high - low)
        expected = math.sqrt((1 - gamma) / gamma)
        found = float(schedules.sigmoid(torch.tensor(t, dtype=torch.float64)))
        assert found == pytest.approx(expected, rel=1e-10)


def test_flow_is_noise_over_signal_of_a_straight_line() -> None:
    torch.testing.assert_close(schedules.flow(T), T / (1 - T), rtol=1e-12, atol=0)


def test_karras_grid_is_the_papers_discretisation() -> None:
    n, low, high, rho = 18, 0.002, 80.0, 7.0
    paper = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    found = sampling_grid(over_range(schedules.karras, low, high), n)
    assert found[:-1] == pytest.approx(paper, rel=1e-6)
    assert found[-1] == 0


def test_lognormal_has_the_quantiles_of_a_normal_distribution_of_log_s() -> None:
    normal = NormalDist(-1.2, 1.2)
    expected = torch.tensor([math.exp(normal.inv_cdf(float(t))) for t in T], dtype=torch.float64)
    torch.testing.assert_close(schedules.lognormal(T), expected, rtol=1e-9, atol=0)


def test_logit_normal_flow_times_are_the_lognormal_schedule() -> None:
    """The flow time s / (1 + s) of lognormal(0, 1) has a standard normal logit."""
    s = schedules.lognormal(T, mean=0.0, std=1.0)
    time = s / (1 + s)
    torch.testing.assert_close(torch.logit(time), torch.special.ndtri(T), rtol=1e-9, atol=1e-12)


def test_loglinear_is_even_in_log_snr() -> None:
    steps = torch.diff(-2 * schedules.loglinear(T).log())
    assert float(steps.std() / steps.mean().abs()) < 1e-10


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("limits", [(0.002, 80.0), (0.002, 320.0), (0.01, 5.0)])
@pytest.mark.parametrize("name", ALL)
def test_every_schedule_reaches_both_ends_of_any_range(name: str, limits: tuple[float, float], shift: float) -> None:
    low, high = limits
    ranged = over_range(getattr(schedules, name), low, high, shift)
    s = ranged(torch.linspace(0, 1, 2001, dtype=torch.float64))
    assert float(s[0]) == pytest.approx(low, rel=1e-6)
    assert float(s[-1]) == pytest.approx(high, rel=1e-6)
    assert bool((torch.diff(s) > 0).all())


def test_a_wider_schedule_is_truncated_not_bent() -> None:
    """As a density: lognormal restricted to a range is the truncated distribution."""
    low, high = 0.05, 2.0
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    normal = NormalDist(-1.2, 1.2)
    first, last = normal.cdf(math.log(low)), normal.cdf(math.log(high))
    expected = [math.exp(normal.inv_cdf(first + float(u) * (last - first))) for u in t]
    found = over_range(schedules.lognormal, low, high)(t)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_shift_multiplies_the_noise() -> None:
    wide = 1e-4, 1e4
    t = torch.linspace(0.3, 0.7, 9, dtype=torch.float64)
    plain = over_range(schedules.cosine, *wide)
    shifted = over_range(schedules.cosine, *wide, shift=4.0)
    middle = float(shifted(torch.tensor(0.5)) / plain(torch.tensor(0.5)))
    assert middle == pytest.approx(4.0, rel=1e-3)
    assert bool((shifted(t) > 3.9 * plain(t)).all())


def test_a_grid_has_as_many_levels_as_steps_and_ends_at_zero() -> None:
    def ranged(t: Tensor) -> Tensor:
        return over_range(schedules.loglinear, 0.002, 80.0)(t)

    for steps in (1, 2, 15, 1000):
        grid = sampling_grid(ranged, steps)
        assert len(grid) == steps + 1
        assert grid[0] == pytest.approx(80.0)
        assert grid[-1] == 0.0
        assert all(a > b for a, b in itertools.pairwise(grid))


def test_a_schedule_outside_the_range_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise level between"):
        over_range(partial(schedules.karras, sigma_min=200.0, sigma_max=900.0), 0.002, 40.0)
