"""The samplers against independent implementations: the same denoiser, grid and noise, equal to 1e-4."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkit.core import schedules
from diffkit.core.schedules import over_range, sampling_grid
from parts import samplers
from peers import k_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
Denoise = Callable[[Tensor, float], Tensor]
SHAPE = (3, 3, 8, 8)


def denoise(x: Tensor, s: float) -> Tensor:
    """No closed form: three blurred non-linear terms, so that errors of any order would show."""
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    return 0.6 * torch.tanh(blurred / (0.3 + s)) + 0.25 / (0.25 + s**2) * (x - blurred) + 0.1 * math.sin(math.log(s))


def start(sigma: float) -> Tensor:
    return sigma * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Noises:
    """The same unit noises in the order of asking, for both."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)

    def __call__(self, *interval: Any) -> Tensor:
        return torch.randn(SHAPE, dtype=torch.float64, generator=self.generator)


def last(states: Iterator[Tensor]) -> Tensor:
    *_, state = states
    return state


def equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == torch.float64
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < 1e-4


KDIFFUSION: dict[str, tuple[Callable[..., Iterator[Tensor]], str, dict[str, Any]]] = {
    "euler": (samplers.euler, "sample_euler", {}),
    "ancestral": (samplers.ancestral, "sample_euler_ancestral", {"eta": 1.0}),
    "heun": (samplers.heun, "sample_heun", {}),
    "dpm2": (samplers.dpm2, "sample_dpm_2", {}),
    "dpmpp-2s": (samplers.dpmpp_2s, "sample_dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp-2s:eta=0.7": (partial(samplers.dpmpp_2s, eta=0.7), "sample_dpmpp_2s_ancestral", {"eta": 0.7}),
    "dpmpp-2m": (samplers.dpmpp_2m, "sample_dpmpp_2m", {}),
    "dpmpp-2m-sde": (samplers.dpmpp_2m_sde, "sample_dpmpp_2m_sde", {}),
    "dpmpp-2m-sde:eta=0.5": (partial(samplers.dpmpp_2m_sde, eta=0.5), "sample_dpmpp_2m_sde", {"eta": 0.5}),
    "dpmpp-3m-sde": (samplers.dpmpp_3m_sde, "sample_dpmpp_3m_sde", {}),
    "dpmpp-3m": (samplers.dpmpp_3m, "sample_dpmpp_3m_sde", {"eta": 0.0}),
    "lms": (samplers.lms, "sample_lms", {}),
    "lms:order=2": (partial(samplers.lms, order=2), "sample_lms", {"order": 2}),
}


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", KDIFFUSION)
def test_equal_to_k_diffusion(name: str, steps: int) -> None:
    peer = k_diffusion()
    ours, function, options = KDIFFUSION[name]
    grid = sampling_grid(over_range(schedules.karras, 0.01, 80.0), steps)
    if "ancestral" in function or "sde" in function:
        options = {**options, "noise_sampler": Noises()}

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoise(x, float(sigma[0]))

    sigmas = torch.tensor(grid, dtype=torch.float64)
    theirs = getattr(peer, function)(model, start(80.0), sigmas, disable=True, **options)
    equal(last(ours(denoise, start(80.0), grid, Noises())), theirs)


def test_the_stochastic_sampler_of_edm_is_k_diffusions(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = k_diffusion()
    grid = sampling_grid(over_range(schedules.karras, 0.01, 80.0), 18)
    peers, mine = Noises(), Noises()
    inside = [0.05 <= s <= 50 for s in grid[:-1]]
    calls = iter(inside)

    def randn_like(x: Tensor) -> Tensor:
        # It draws at every step, and uses what it drew only inside the range.
        return peers() if next(calls) else torch.zeros_like(x)

    monkeypatch.setattr(peer, "torch", _with(torch, randn_like=randn_like))
    sigmas = torch.tensor(grid, dtype=torch.float64)
    theirs = peer.sample_heun(
        lambda x, sigma: denoise(x, float(sigma[0])),
        start(80.0),
        sigmas,
        disable=True,
        s_churn=40,
        s_tmin=0.05,
        s_tmax=50,
        s_noise=1.003,
    )
    equal(last(samplers.edm_stochastic(denoise, start(80.0), grid, mine)), theirs)


class _with:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@pytest.mark.parametrize("name", ["DDIM", "DDPM"])
def test_equal_to_diffusers_ddim_and_ddpm(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"num_train_timesteps": 1000, "clip_sample": False, "timestep_spacing": "leading"}
    if name == "DDIM":
        options["set_alpha_to_one"] = True
    scheduler = getattr(diffusers, f"{name}Scheduler")(**options)
    scheduler.set_timesteps(20)
    alphas = scheduler.alphas_cumprod.double()
    levels = ((1 - alphas) / alphas).sqrt()
    grid = [*levels[scheduler.timesteps].tolist(), 0.0]
    theirs_noise = Noises()
    x = start(grid[0]) / math.sqrt(1 + grid[0] ** 2)
    for t, s in zip(scheduler.timesteps, grid[:-1], strict=True):
        a = 1 / math.sqrt(1 + s * s)
        eps = (x - a * denoise(x / a, s)) / (a * s)
        if name == "DDIM":
            x = scheduler.step(eps, t, x, eta=0.0).prev_sample
        else:
            x = _ddpm_step(scheduler, eps, t, x, theirs_noise)
    ours = samplers.euler if name == "DDIM" else samplers.ancestral
    equal(last(ours(denoise, start(grid[0]), grid, Noises())), x)


def _ddpm_step(scheduler: Any, eps: Tensor, t: Tensor, x: Tensor, noise: Noises) -> Tensor:
    """Its own step, with the noise it draws replaced by the one given."""
    import diffusers.schedulers.scheduling_ddpm as module

    original = module.randn_tensor
    module.randn_tensor = lambda *_, **__: noise()
    try:
        result: Tensor = scheduler.step(eps, t, x).prev_sample
    finally:
        module.randn_tensor = original
    return result


def _with_grid(scheduler: Any, grid: list[float]) -> Any:
    """A scheduler on our noise levels, in double precision."""
    scheduler.set_timesteps(len(grid) - 1)
    scheduler.sigmas = torch.tensor(grid, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(grid) - 1, 0, -1)
    scheduler.num_inference_steps = len(grid) - 1
    return scheduler


def _run(scheduler: Any, grid: list[float]) -> Tensor:
    x = start(grid[0]) / math.sqrt(1 + grid[0] ** 2)
    for t, s in zip(scheduler.timesteps, grid[:-1], strict=True):
        a = 1 / math.sqrt(1 + s * s)
        eps = (x - a * denoise(x / a, s)) / (a * s)
        x = scheduler.step(eps, t, x).prev_sample
    return x * math.sqrt(1 + grid[-1] ** 2)


MULTISTEP: dict[str, tuple[Callable[..., Iterator[Tensor]], str, dict[str, Any]]] = {
    "dpmpp-2m": (samplers.dpmpp_2m, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    # solver_type concerns the one step of second order that leads up to the third.
    "dpmpp-3m": (samplers.dpmpp_3m, "DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}),
    "unipc:order=2": (partial(samplers.unipc, order=2), "UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc": (samplers.unipc, "UniPCMultistepScheduler", {"solver_order": 3}),
    "deis:order=2": (partial(samplers.deis, order=2), "DEISMultistepScheduler", {"solver_order": 2}),
    "deis": (samplers.deis, "DEISMultistepScheduler", {"solver_order": 3}),
}


@pytest.mark.parametrize("ends", ["at 0", "above 0"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_equal_to_diffusers_multistep(name: str, ends: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    ours, theirs, options = MULTISTEP[name]
    if name.startswith("deis") and ends == "at 0":
        pytest.skip("diffusers' DEIS takes a logarithm of the last level")
    options = {**options, "prediction_type": "epsilon"}
    if ends == "above 0":
        options["lower_order_final"] = False
        if name.startswith("dpmpp"):
            options["final_sigmas_type"] = "sigma_min"
    grid = sampling_grid(over_range(schedules.loglinear, 0.05, 20.0), 20)
    grid = grid if ends == "at 0" else grid[:-1]
    scheduler = _with_grid(getattr(diffusers, theirs)(**options), grid)
    equal(last(ours(denoise, start(20.0), grid, Noises())), _run(scheduler, grid))


def test_equal_to_diffusers_edm_heun() -> None:
    """HeunDiscreteScheduler, whose levels may be EDM's: two calls a step, one for the last."""
    diffusers = pytest.importorskip("diffusers")
    grid = sampling_grid(over_range(schedules.karras, 0.02, 80.0), 12)
    scheduler = diffusers.HeunDiscreteScheduler(prediction_type="epsilon")
    scheduler.set_timesteps(12)
    doubled = [grid[0], *itertools.chain.from_iterable((s, s) for s in grid[1:-1]), 0.0]
    scheduler.sigmas = torch.tensor(doubled, dtype=torch.float64)
    scheduler.timesteps = torch.from_numpy(np.arange(len(doubled) - 1, 0, -1).astype(np.float64))
    x = start(80.0)
    for number, t in enumerate(scheduler.timesteps):
        # A step's second call is at the level it leads to.
        s = doubled[number] if number % 2 == 0 else doubled[number + 1]
        eps = (x - denoise(x, s)) / s
        x = scheduler.step(eps, t, x).prev_sample
    equal(last(samplers.heun(denoise, start(80.0), grid, Noises())), x)
