"""Sampling: from (seed, image index) to pictures, the same at any batch size."""

from __future__ import annotations

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
    device = next(denoiser.network.parameters()).device
    for start in range(0, len(indices), batch_size):
        chosen = list(indices[start : start + batch_size])
        positions = torch.tensor(chosen, device=device)
        label = None
        if spec.classes:
            labels = classes[start : start + batch_size] if classes is not None else [-1] * len(chosen)
            label = one_hot(torch.tensor(labels), spec.label_width).to(device)
        counted = _Counted(denoiser, label)
        denoise: Denoise = guided(counted, counted.unlabelled, plan.guidance) if classes is not None else counted
        last = deque(_steps(plan, denoise, _start(spec, plan, positions), positions), maxlen=1)
        yield Images(encode(last[0]).cpu().numpy(), chosen, counted.calls)


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
