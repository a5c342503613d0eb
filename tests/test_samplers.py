"""Samplers against the exact solution for Gaussian data: order, exact output variance, purity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit.core import predictions, schedules
from diffkit.core.denoiser import Denoiser
from diffkit.core.schedules import over_range, sampling_grid
from diffkit.testing import check_sampler
from parts import samplers

Sampler = Callable[..., Iterator[Tensor]]
DETERMINISTIC: dict[str, tuple[Sampler, int, int]] = {  # function, measured order, network calls a step
    "euler": (samplers.euler, 1, 1),
    "heun": (samplers.heun, 2, 2),
    "dpm2": (samplers.dpm2, 2, 2),
    "dpmpp-2s": (samplers.dpmpp_2s, 2, 2),
    "dpmpp-2m": (samplers.dpmpp_2m, 2, 1),
    "dpmpp-3m": (samplers.dpmpp_3m, 2, 1),
    "dpmpp-3m:corrected": (partial(samplers.dpmpp_3m, corrected=True), 3, 1),
    "unipc:order=2": (partial(samplers.unipc, order=2), 3, 1),
    "unipc": (samplers.unipc, 4, 1),
    "deis:order=2": (partial(samplers.deis, order=2), 2, 1),
    "deis": (samplers.deis, 3, 1),
    "ipndm": (samplers.ipndm, 2, 1),
    "lms:order=3": (partial(samplers.lms, order=3), 3, 1),
    "lms": (samplers.lms, 4, 1),
}
STOCHASTIC: dict[str, Sampler] = {
    "ancestral": samplers.ancestral,
    "edm-stochastic": samplers.edm_stochastic,
    "dpmpp-2s:eta": partial(samplers.dpmpp_2s, eta=1.0),
    "dpmpp-2m-sde": samplers.dpmpp_2m_sde,
    "dpmpp-3m-sde": samplers.dpmpp_3m_sde,
}
CALLS = {name: entry[2] for name, entry in DETERMINISTIC.items()} | {"edm-stochastic": 2, "dpmpp-2s:eta": 2}
ALL: dict[str, Sampler] = {name: entry[0] for name, entry in DETERMINISTIC.items()} | STOCHASTIC
SCHEDULES = ["cosine", "linear", "sigmoid", "flow", "karras", "lognormal", "loglinear"]
PREDICTIONS = ["eps", "x0", "v", "flow", "edm"]
SD = 0.5


def last(states: Iterator[Tensor]) -> Tensor:
    *_, state = states
    return state


def exact(sd: float, mean: float = 0.0) -> Callable[[Tensor, float], Tensor]:
    """The ideal denoiser of data with this mean and standard deviation."""
    return lambda x, s: mean + sd**2 / (sd**2 + s**2) * (x - mean)


def no_noise(s: float, s_next: float) -> Tensor:
    raise AssertionError("a deterministic sampler asks for no noise")


def output_variance(
    sampler: Sampler, denoise: Callable[[Tensor, float], Tensor], sigmas: list[float], sd: float
) -> float:
    """Exact, with no Monte Carlo: a sampler of Gaussian data is linear, so feed unit vectors as noises."""
    steps = len(sigmas)
    x = torch.zeros(1, 1, 1, steps, dtype=torch.float64)
    x[..., 0] = math.sqrt(sd**2 + sigmas[0] ** 2)
    number = itertools.count(1)

    def noise(s: float, s_next: float) -> Tensor:
        unit = torch.zeros_like(x)
        unit[..., next(number)] = 1
        return unit

    return float(last(sampler(denoise, x, sigmas, noise)).square().sum())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_sampler_reaches_its_order(name: str) -> None:
    """On karras from 80 to 0.002, ending above 0, against x(s) = x0 sqrt((sd^2 + s^2) / (sd^2 + s0^2))."""
    sampler, order, _ = DETERMINISTIC[name]
    errors, counts = [], [160, 320, 640]
    for steps in counts:
        sigmas = sampling_grid(schedules.over_range(schedules.karras, 0.002, 80.0), steps + 1)[:-1]
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        found = float(last(sampler(exact(SD), x, sigmas, no_noise)))
        truth = math.sqrt((SD**2 + sigmas[-1] ** 2) / (SD**2 + sigmas[0] ** 2))
        errors.append(abs(found / truth - 1))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_is_the_way_back(name: str) -> None:
    """The grid may rise: up and down again returns to the start."""
    sampler, _, _ = DETERMINISTIC[name]
    falling = sampling_grid(schedules.over_range(schedules.karras, 0.01, 80.0), 1001)[:-1]
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up = last(sampler(exact(SD), x, falling[::-1], no_noise))
    down = last(sampler(exact(SD), up, falling, no_noise))
    torch.testing.assert_close(down, x, rtol=0.01, atol=0)


def ideal(prediction: Callable[[Tensor], Any], sd: float) -> Denoiser:
    """A denoiser made of this prediction type and the network that is perfect for Gaussian data."""

    class Network(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            s = torch.exp(4 * c_noise.double())
            skip, out, inp = prediction(s)
            return x / inp * (sd**2 / (sd**2 + s**2) - skip) / out

    return Denoiser(Network(), prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ALL)
def test_every_combination_has_the_right_variance_at_a_thousand_calls(
    sampler: str, schedule: str, prediction: str
) -> None:
    function = getattr(predictions, prediction)
    if prediction == "edm":
        function = partial(function, sigma_data=SD)
    # These two have steps at their ends over which a parabola through three answers overshoots: +2.5 % and +28 %.
    overshoots = sampler == "dpmpp-3m-sde" and schedule in {"linear", "sigmoid"}
    steps = (4000 if overshoots else 1000) // CALLS.get(sampler, 1)
    grid = sampling_grid(over_range(getattr(schedules, schedule), 0.002, 80.0), steps)
    variance = output_variance(ALL[sampler], ideal(function, SD), grid, SD)
    assert variance == pytest.approx(SD**2, rel=0.02)


def default_grid(steps: int, side: int) -> list[float]:
    from diffkit.config import SampleSettings

    choice = SampleSettings().scheduler
    shape = partial(getattr(schedules, choice.name), **choice.options)
    return sampling_grid(over_range(shape, 0.002, 80 * side / 32), steps)


@pytest.mark.parametrize("side", [16, 32, 128])
@pytest.mark.parametrize(("calls", "tolerance"), [(20, 0.03), (50, 0.01)])
def test_the_default_sampler_on_the_default_grid_keeps_the_variance(calls: int, tolerance: float, side: int) -> None:
    from diffkit.config import SampleSettings

    choice = SampleSettings().sampler
    default = partial(getattr(samplers, choice.name.replace("-", "_")), **choice.options)
    variance = output_variance(default, exact(SD), default_grid(calls, side), SD)
    assert variance == pytest.approx(SD**2, rel=tolerance)


def test_no_grid_lets_euler_keep_the_variance_in_twenty_calls() -> None:
    """Euler's best grid for Gaussian data is even in atan(s / sd): a bound on what DDIM can do in 20 calls.

    The relative error of a step is h^2 x'' / 2x with x = sqrt(sd^2 + s^2); spread evenly it adds up to (pi / 2)^2 / 2N
    in x, twice that in the variance: 12 % at N = 20. docs/samplers.md states it.
    """
    angles = torch.linspace(math.atan(80 / SD), math.atan(0.002 / SD), 20, dtype=torch.float64)
    best = [*(SD * torch.tan(angles)).tolist(), 0.0]
    lost = 1 - output_variance(samplers.euler, exact(SD), best, SD) / SD**2
    assert lost == pytest.approx((math.pi / 2) ** 2 / 20, rel=0.15)
    assert 1 - output_variance(samplers.euler, exact(SD), default_grid(20, 32), SD) / SD**2 > lost


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_keeps_the_contract(name: str) -> None:
    check_sampler(ALL[name])


def test_ancestral_without_fresh_noise_is_euler() -> None:
    sigmas = sampling_grid(over_range(schedules.karras, 0.002, 80.0), 10)
    x = 80 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a = last(samplers.ancestral(exact(SD), x, sigmas, no_noise, eta=0.0))
    b = last(samplers.euler(exact(SD), x, sigmas, no_noise))
    torch.testing.assert_close(a, b)


def test_ancestral_step_is_ddpms_posterior() -> None:
    """Mean and variance of q(x_next | x, clean) for the variance-preserving process (Ho et al. 2020, eq. 7)."""
    s, s_next, clean, x = 3.0, 2.0, 0.4, -1.7
    a, a_next = 1 / (1 + s**2), 1 / (1 + s_next**2)  # alpha_bar
    beta = 1 - a / a_next
    mean_vp = (math.sqrt(a_next) * beta * clean + math.sqrt(1 - beta) * (1 - a_next) * x * math.sqrt(a)) / (1 - a)
    variance_vp = (1 - a_next) / (1 - a) * beta
    fresh = 0.8
    start = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    found = last(
        samplers.ancestral(
            lambda x, s: torch.full_like(x, clean), start, [s, s_next], lambda s, n: torch.full_like(start, fresh)
        )
    )
    expected = (mean_vp + math.sqrt(variance_vp) * fresh) / math.sqrt(a_next)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_heun_calls_the_network_twice_a_step_and_once_for_a_step_to_zero() -> None:
    calls = []

    def counting(x: Tensor, s: float) -> Tensor:
        calls.append(s)
        return exact(SD)(x, s)

    last(samplers.heun(counting, torch.ones(1, 1, 1, 1), [4.0, 2.0, 1.0, 0.0], no_noise))
    assert calls == [4.0, 2.0, 2.0, 1.0, 1.0]


MIXTURES = {  # weight, mean, standard deviation
    "two apart": [(0.5, -0.7, 0.1), (0.5, 0.7, 0.1)],
    "uneven": [(0.8, -0.2, 0.05), (0.2, 0.9, 0.2)],
    "three": [(0.3, -0.9, 0.05), (0.4, 0.0, 0.15), (0.3, 0.8, 0.1)],
    "narrow in wide": [(0.5, 0.1, 0.02), (0.5, 0.0, 0.5)],
}


def mixture_denoiser(parts: list[tuple[float, float, float]]) -> Callable[[Tensor, float], Tensor]:
    """The posterior mean of the clean value, in closed form."""
    weight, mean, sd = torch.tensor(parts, dtype=torch.float64).T[:, :, None]

    def denoise(x: Tensor, s: float) -> Tensor:
        variance = sd**2 + s**2
        flat = x.flatten().double()
        share = torch.softmax(weight.log() - variance.log() / 2 - (flat - mean) ** 2 / (2 * variance), dim=0)
        return (share * (mean + sd**2 / variance * (flat - mean))).sum(0).reshape(x.shape).to(x.dtype)

    return denoise


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_sampler_draws_from_a_mixture(name: str, mixture: str) -> None:
    """Kolmogorov-Smirnov distance to the true distribution function; 1.36 / sqrt(n) is its 5 % point."""
    parts, count = MIXTURES[mixture], 40_000
    generator = torch.Generator().manual_seed(1)
    grid = sampling_grid(over_range(schedules.karras, 0.002, 80.0), 300)
    options = {"s_noise": 1.0} if name == "edm-stochastic" else {}

    def noise(s: float, s_next: float) -> Tensor:
        return torch.randn(1, 1, 1, count, generator=generator, dtype=torch.float64)

    x = noise(0, 0) * 80
    found = last(ALL[name](mixture_denoiser(parts), x, grid, noise, **options)).flatten().sort().values
    weight, mean, sd = torch.tensor(parts, dtype=torch.float64).T[:, :, None]
    truth = (weight * torch.special.ndtr((found - mean) / sd)).sum(0)
    distance = float((truth - (torch.arange(count) + 0.5) / count).abs().max())
    assert distance < 1.36 / math.sqrt(count) + 0.005  # and what 300 steps leave


def test_the_adaptive_sampler_keeps_its_tolerance_whatever_the_company() -> None:
    calls = 0

    def counting(x: Tensor, s: float | Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact(SD)(x, torch.as_tensor(s, dtype=x.dtype).reshape(-1, 1, 1, 1))  # type: ignore[arg-type]

    x = 80 * torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[1] *= 3
    truth = x * math.sqrt((SD**2 + 0.002**2) / (SD**2 + 80**2))
    found, cost = {}, []
    for tolerance in (0.1, 0.01, 0.001):
        calls = 0
        found[tolerance] = last(samplers.adaptive(counting, x, [80.0, 0.002], no_noise, tolerance=tolerance))
        assert float((found[tolerance] - truth).abs().max()) < 4 * tolerance  # the errors of the steps add up
        cost.append(calls)
    assert cost == sorted(cost) and cost[0] < cost[-1] / 2
    alone = last(samplers.adaptive(counting, x[2:3], [80.0, 0.002], no_noise, tolerance=0.01))
    torch.testing.assert_close(alone, found[0.01][2:3])


def test_the_adaptive_sampler_ends_when_the_model_answers_nonsense() -> None:
    def nonsense(x: Tensor, s: float | Tensor) -> Tensor:
        return x * math.nan

    assert last(samplers.adaptive(nonsense, torch.ones(2, 1, 2, 2), [80.0, 0.002, 0.0], no_noise)).isnan().all()


@pytest.mark.parametrize("name", ALL)
def test_a_step_takes_a_handful_of_tensor_operations(name: str) -> None:
    """Outside the network, per network call; and none of them brings a number back from the device."""
    from torch.utils._python_dispatch import TorchDispatchMode

    operations: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if any(isinstance(arg, Tensor) and arg.dim() == 4 for arg in (*args, *(kwargs or {}).values())):
                operations.append(str(function))
            return function(*args, **(kwargs or {}))

    steps = 20
    grid = sampling_grid(over_range(schedules.karras, 0.002, 80.0), steps)
    fixed = torch.zeros(2, 3, 4, 4)
    with Count():
        last(ALL[name](lambda x, s: fixed, torch.ones(2, 3, 4, 4), grid, lambda s, n: fixed))
    assert len(operations) / steps / CALLS.get(name, 1) <= 12
    assert not [name for name in operations if "_local_scalar_dense" in name]
