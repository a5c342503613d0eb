"""A training step and each sampler on a GPU that is not there: devices, transfers, waits, and kernels counted."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkit import builtin
from diffkit.backbones.unet import unet
from diffkit.core import random
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import edm
from diffkit.core.schedules import cosine, karras, over_range, sampling_grid
from diffkit.engine.batches import Batch, Batches
from diffkit.engine.casts import CastTogether
from diffkit.engine.devices import autocast
from diffkit.engine.sample import Plan, _steps
from diffkit.engine.train import State, train
from diffkit.interfaces import ImageSpec
from fake_cuda import CUDA, Kernels, fake_cuda
from test_train import recipe

# By copying a fake network, which has no data.
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
SPEC = ImageSpec(3, 8, 8, ("a", "b"))


class Stored:
    """Labels; the images are on the device."""

    count, spec = 40, SPEC

    def gather(self, *_: Any) -> Any:
        raise AssertionError("nothing is read")

    def column(self, kind: str, indices: Any, part: str = "train") -> Any:
        return indices % 3 - 1 if kind == "labels" else None


@pytest.fixture(autouse=True)
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise as where the trial has chosen the kernel."""
    normal_kernel = pytest.importorskip("diffkit.core.normal_kernel")
    monkeypatch.setattr(random, "_kernel", lambda device: normal_kernel.normal)


def unknown_gradients(loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """In place of the backward pass, for which torch asks a driver."""
    assert loss.device == CUDA and loss.requires_grad
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def steps_on_cuda(monkeypatch: pytest.MonkeyPatch, objective: Any = squared_error, **options: Any) -> tuple[State, Any]:
    """A training, whose data set is on the device, and its events; to be called in `fake_cuda`."""
    with torch.device("cuda"):
        net = unet(SPEC, width=8, multipliers=(1, 2), blocks=1, attention=4)
    numbers = recipe(ema_lengths=(0.1,))
    state = State(net, numbers)
    parameters = list(net.parameters())
    monkeypatch.setattr(Tensor, "backward", lambda loss: unknown_gradients(loss, parameters))
    monkeypatch.setattr(Batch, "pinned", lambda batch: batch)
    images = torch.empty(40, 8, 8, 3, dtype=torch.uint8, device="cuda")
    return state, train(
        state,
        Denoiser(CastTogether(net, net), partial(edm, sigma_data=0.5), autocast(CUDA, "bfloat16")),
        Batches(Stored(), SPEC, 0, flip=True, label_dropout=0.3, resident={"images": images}),
        over_range(cosine, 0.002, 80.0),
        objective,
        numbers,
        report_every=1000,
        cuda_graphs=False,
        **options,
    )


@pytest.mark.parametrize("on_nan", ["abort", "skip"])
def test_a_step_sends_little_waits_for_nothing_and_stays_on_the_device(
    monkeypatch: pytest.MonkeyPatch, on_nan: Any
) -> None:
    """The second step of a training: noise by one kernel, weights cast by one; then clipping, AdamW, two averages."""
    with fake_cuda(monkeypatch):
        state, steps = steps_on_cuda(monkeypatch, on_nan=on_nan)
        next(steps)
        with Kernels() as kernels:
            next(steps)
        steps.close()
    weights = {tuple(each.shape) for each in state.network.parameters()}
    assert kernels.waits == [] and kernels.doubles == []
    # The table of coefficients, places and labels of the images, positions, and shares of the noise levels.
    assert sorted(shape for _, shape in kernels.moved) == [(5, 8), (8,), (8,), (8, 2), (8, 4)]
    assert kernels.names["normal"] == 1
    assert kernels.names["_foreach_copy_"] == 1
    assert {shape for shape, *_ in kernels.casts} & weights == set()
    counted = {name: count for name, count in kernels.names.items() if name.startswith("_f")}
    expected = {"_foreach_copy_": 1, "_foreach_norm": 1, "_foreach_mul_": 1, "_fused_adamw_": 1}
    average = (
        {"_foreach_lerp_": 2} if on_nan == "abort" else {"_foreach_sub": 2, "_foreach_mul_": 2, "_foreach_add_": 2}
    )
    for name, count in average.items():
        expected[name] = expected.get(name, 0) + count
    assert counted == expected
    for name, tensor in state.checkpoint().tensors.items():
        assert tensor.device == CUDA and tensor.dtype == torch.float32, name


def test_what_hangs_together_in_a_circle_is_gone_before_a_smaller_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might hold the memory that the pass wants."""
    made = []

    class Kept:
        def __init__(self) -> None:
            self.circle = self

    def hungry(denoiser: Denoiser, clean: Tensor, *rest: Any) -> Tensor:
        if len(clean) > 4:
            kept = Kept()
            made.append(weakref.ref(kept))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return squared_error(denoiser, clean, *rest)

    gc.disable()  # or it might go by itself
    try:
        with fake_cuda(monkeypatch):
            _, steps = steps_on_cuda(monkeypatch, hungry)
            assert next(steps).micro_batch == 4
            assert made[0]() is None
            steps.close()
    finally:
        gc.enable()


WITH_NOISE = {"ancestral", "ddpm", "dpmpp-2m-sde", "dpmpp-3m-sde", "edm-stochastic"}


class Half(nn.Module):
    """Halves its input: what is counted is what a sampler does beside it."""

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("name", sorted(set(builtin.samplers()) - {"adaptive"}))
def test_a_sampler_stays_on_the_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """(adaptive has to look at its errors.) With the kernel, noise costs a few operations a step."""
    sigmas = sampling_grid(over_range(karras, 0.002, 80.0), 15)
    plan = Plan(resolve_name(builtin.samplers()[name]), sigmas, (0.0, 0.0, 0.0))
    denoiser = Denoiser(Half(), partial(edm, sigma_data=0.5))
    with fake_cuda(monkeypatch):
        x, positions = torch.empty(2, 3, 8, 8, device="cuda"), torch.arange(2, device="cuda")
        with Kernels() as kernels:
            *_, last = _steps(plan, lambda x, s: denoiser(x, s), x, positions)
    assert last.device == CUDA and last.dtype == torch.float32 and last.shape == x.shape
    assert kernels.waits == kernels.moved == kernels.doubles == []
    assert sum(kernels.names.values()) / 15 <= (90 if name in WITH_NOISE else 26), kernels.names
    assert (kernels.names["normal"] > 0) == (name in WITH_NOISE)
