"""On a device without float64 all of it still runs: what needs float64 is computed on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from diffkit.backbones.unet import unet
from diffkit.core import random, schedules, tasks, weightings
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import edm
from diffkit.core.random import Purpose, uniform
from diffkit.core.schedules import density, over_range, sampling_grid
from diffkit.core.weighing import by_weighting
from diffkit.engine.batches import Batches, Task
from diffkit.engine.sample import Given, Guidance, Plan, invert, sample, trajectory
from diffkit.engine.train import Progress, Recipe, State, train
from diffkit.engine.validate import Validation
from diffkit.interfaces import ImageSpec
from elsewhere import ELSEWHERE, Elsewhere, placed
from parts import samplers

SPEC = ImageSpec(3, 8, 8, ("a", "b"))
PREDICTION = partial(edm, sigma_data=0.5)
TASKS = {"none": None, "inpaint": tasks.inpaint, "colorize": tasks.colorize, "super-resolution": tasks.super_resolution}


class Memory:
    """Images of noise in two classes."""

    count, holdout_count, spec = 8, 4, SPEC

    def column(self, kind: str, indices: npt.NDArray[np.int64], part: str = "train") -> npt.NDArray[Any] | None:
        if kind == "labels":
            return indices % 2
        pixels = np.random.default_rng(0).integers(0, 256, (self.count, 8, 8, 3), np.uint8)
        return pixels[indices] if kind == "images" else None

    def gather(
        self, indices: npt.NDArray[np.int64], part: str = "train"
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
        pixels = self.column("images", indices)
        assert pixels is not None
        return pixels, indices % 2


class Small(nn.Module):
    """A network with labels, of few operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        answer: Tensor = self.conv(x) + (self.embed(label) * c_noise[:, None])[:, :, None, None]
        return answer


def small() -> Denoiser:
    return Denoiser(placed(Small).eval(), PREDICTION)


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    with Elsewhere():
        yield


def test_float64_there_and_tensors_of_two_devices_are_noticed() -> None:
    there = torch.zeros(2, device=ELSEWHERE)
    with pytest.raises(AssertionError, match="float64"):
        there.double()
    with pytest.raises(AssertionError, match="two devices"):
        there + torch.zeros(2)
    assert (there + torch.tensor(1.0)).device == ELSEWHERE


@pytest.mark.parametrize(
    ("name", "resident"), [("none", False), ("inpaint", True), ("colorize", False), ("super-resolution", True)]
)
def test_a_training_and_its_validation(name: str, resident: bool) -> None:
    task: Task | None = TASKS[name]
    channels = {"none": 0, "inpaint": 4, "colorize": 1, "super-resolution": 3}[name]
    data, levels = Memory(), over_range(schedules.lognormal, 0.002, 80.0)
    recipe = Recipe(4, 2, 1e-3, 1, (0.9, 0.99), 0.0, 1.0, 1e4, 0, ema_lengths=(0.1,), learned_weighting=True)
    spec = ImageSpec(3, 8, 8, ("a", "b"), image_channels=channels)
    state = State(placed(lambda: unet(spec, width=8, multipliers=(1,), blocks=1, attention=8)), recipe)
    denoiser = Denoiser(state.network, PREDICTION, near=name == "colorize")
    kept = {"images": torch.zeros(8, 8, 8, 3, dtype=torch.uint8, device=ELSEWHERE)} if resident else {}
    batches = Batches(data, SPEC, 0, True, 0.1, task, kept)
    weigh = by_weighting(weightings.min_snr, density(levels), PREDICTION, levels)
    events = [*train(state, denoiser, batches, levels, squared_error, recipe, weigh=weigh, until_images=4)]
    assert [isinstance(each, Progress) for each in events] == [True]
    averaged = Denoiser(state.average, PREDICTION, near=name == "colorize")
    found = Validation(data, SPEC, levels, 0, task)(averaged, 4)
    assert len(found.holdout) == 8


def plan(sampler: Any, **changes: Any) -> Plan:
    grid = sampling_grid(over_range(schedules.karras, 0.002, 80.0), 4)
    return Plan(sampler, grid, (0.1, 0.2, 0.3), **changes)


def labels(indices: Any) -> Given:
    return Given(label=torch.eye(2)[[i % 2 for i in indices]])


@pytest.mark.parametrize("name", sorted(vars(samplers)))
def test_every_sampler(name: str) -> None:
    (made,) = sample(small(), SPEC, plan(getattr(samplers, name)), range(2), labels)
    assert made.pixels.shape == (2, 8, 8, 3)


@pytest.mark.parametrize("sampler", [samplers.deis, samplers.edm_stochastic, samplers.adaptive])
def test_guidance_editing_tiles_films_and_inversion(sampler: Any) -> None:
    denoiser = small()
    guidance = Guidance(2.0, denoiser, 1.5, interval=(0.1, 10.0), rescale=0.5, threshold=0.9)
    guided = plan(sampler, guidance=guidance, resample=2, strength=0.5)
    source = torch.zeros(2, 3, 8, 8)

    def edited(indices: Any) -> Given:
        return Given(label=torch.eye(2), source=source, mask=torch.ones(2, 1, 8, 8))

    assert len([*sample(denoiser, SPEC, guided, range(2), edited)]) == 1
    (large,) = sample(denoiser, SPEC, plan(sampler), range(2), labels, size=(12, 16))
    assert large.pixels.shape == (2, 12, 16, 3)
    assert len([*trajectory(denoiser, SPEC, plan(sampler), range(2), labels)]) == 4
    noise = invert(denoiser, plan(samplers.heun), Given(label=torch.eye(2), source=source))
    assert noise.device == ELSEWHERE


class Away(Tensor):
    """Says that it is elsewhere."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return ELSEWHERE


def test_numbers_drawn_there_are_those_of_the_cpu_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = [0, 1, 2**24 - 1, 2**24 + 1, 2**25 + 2, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    words = torch.cat([torch.tensor(edges), torch.randint(0, 2**32, (10_000,))])[None]
    monkeypatch.setattr(random, "bits", lambda *_: words)
    exact = uniform(0, Purpose.TASK, torch.zeros(1))
    monkeypatch.setattr(random, "bits", lambda *_: words.as_subclass(Away))
    found = uniform(0, Purpose.TASK, torch.zeros(1)).as_subclass(Tensor)
    assert found.dtype == torch.float32 and exact.dtype == torch.float64
    assert torch.equal(found, exact.float().clamp(max=1 - 2.0**-24)) and float(found.max()) < 1
    assert float(exact.max()) < 1 and math.isclose(float(found.min()), 2.0**-33)
