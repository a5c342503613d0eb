"""Sampling: from (seed, image index) to pictures, the same at any batch size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.core.denoiser import Denoiser
from diffkit.core.guidance import guided
from diffkit.core.random import Purpose, normal
from diffkit.engine.batches import one_hot
from diffkit.engine.codec import encode
from diffkit.interfaces import Denoise, ImageSpec

SamplerFunction = Callable[..., Iterator[Tensor]]


@dataclass(frozen=True)
class Plan:
    """How images are made. `sigmas`: noise levels, falling, the last 0; `mean`: the data's colour, per channel;
    `names`: sampler and grid as words, for the record."""

    sampler: SamplerFunction
    sigmas: Sequence[float]
    mean: Sequence[float]
    guidance: float = 1.0
    seed: int = 0
    names: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """A batch of finished images: uint8 [B, H, W, C], their indices, and the network calls each has cost."""

    pixels: npt.NDArray[np.uint8]
    indices: list[int]
    calls: int


def sample(
    denoiser: Denoiser,
    spec: ImageSpec,
    plan: Plan,
    indices: Sequence[int],
    classes: Sequence[int] | None = None,
    *,
    batch_size: int = 64,
) -> Iterator[Images]:
    """Make image number i for each i of `indices`, yielding batch by batch.

    `classes` gives one class index per image (negative = without label). An image depends on the seed, its index,
    its class and the plan only.
    """
    for start in range(0, len(indices), batch_size):
        chosen = list(indices[start : start + batch_size])
        labels = None if classes is None else classes[start : start + batch_size]
        counted, steps = _begun(denoiser, spec, plan, chosen, labels)
        last = deque(steps, maxlen=1)
        yield Images(encode(last[0]).cpu().numpy(), chosen, counted.calls)


def trajectory(
    denoiser: Denoiser, spec: ImageSpec, plan: Plan, indices: Sequence[int], classes: Sequence[int] | None = None
) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
    """The same images after each step, with its noise level s: uint8 [B, H, W, C].

    An image at level s is shown as mean + (x - mean) / (1 + s^2)^1/2, so that noise does not outshine it.
    """
    _, steps = _begun(denoiser, spec, plan, list(indices), classes)
    mean = torch.tensor(plan.mean, dtype=torch.float32)[:, None, None]
    for s, x in zip(plan.sigmas[1:], steps, strict=True):
        shown = mean + (x.cpu() - mean) / math.sqrt(1 + s * s)
        yield s, encode(shown).numpy()


def _begun(
    denoiser: Denoiser, spec: ImageSpec, plan: Plan, indices: list[int], classes: Sequence[int] | None
) -> tuple[_Counted, Iterator[Tensor]]:
    """The denoiser, which counts its calls, and the steps that the sampler will take with it."""
    device = next(denoiser.network.parameters()).device
    positions = torch.tensor(indices, device=device)
    label = None
    if spec.classes:
        labels = classes if classes is not None else [-1] * len(indices)
        label = one_hot(torch.tensor(labels), spec.label_width).to(device)
    counted = _Counted(denoiser, label)
    denoise: Denoise = guided(counted, counted.unlabelled, plan.guidance) if classes is not None else counted
    return counted, _steps(plan, denoise, _start(spec, plan, positions), positions)


def _start(spec: ImageSpec, plan: Plan, positions: Tensor) -> Tensor:
    """The data's mean colour under noise of the highest level."""
    shape = (spec.channels, spec.height, spec.width)
    mean = torch.tensor(plan.mean, device=positions.device, dtype=torch.float32)[:, None, None]
    return mean + plan.sigmas[0] * normal(plan.seed, Purpose.START_NOISE, positions, shape)


def _steps(plan: Plan, denoise: Denoise, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """The sampler's steps, each in inference mode (which must not be held across a yield)."""
    intervals: dict[tuple[float, float], int] = {}
    shape = tuple(x.shape[1:])

    def noise(s: float, s_next: float) -> Tensor:
        interval = intervals.setdefault((s, s_next), len(intervals))
        return normal(plan.seed, Purpose.STEP_NOISE, positions, shape, interval)

    steps = plan.sampler(denoise, x, plan.sigmas, noise)
    while True:
        with torch.inference_mode():
            state = next(steps, None)
        if state is None:
            return
        yield state


class _Counted:
    """A denoiser under a fixed label that counts network calls."""

    def __init__(self, denoiser: Denoiser, label: Tensor | None) -> None:
        self.denoiser, self.calls = denoiser, 0
        self.condition = {} if label is None else {"label": label}
        self.empty = {} if label is None else {"label": torch.zeros_like(label)}

    def __call__(self, x: Tensor, s: float) -> Tensor:
        self.calls += 1
        return self.denoiser(x, s, self.condition)

    def unlabelled(self, x: Tensor, s: float) -> Tensor:
        self.calls += 1
        return self.denoiser(x, s, self.empty)
