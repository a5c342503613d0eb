"""Sampling: from (seed, image index) to pictures, the same at any batch size."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffkit.core.brownian import Path
from diffkit.core.denoiser import Denoiser
from diffkit.core.editing import kept, resampled
from diffkit.core.guidance import ALWAYS, guided, thresholded
from diffkit.core.random import Purpose, normal, normals
from diffkit.engine.codec import encode
from diffkit.engine.pieces import Pieces
from diffkit.engine.tiles import tiled
from diffkit.interfaces import Denoise, ImageSpec

SamplerFunction: TypeAlias = Callable[..., Iterator[Tensor]]


@dataclass(frozen=True)
class Guidance:
    """How the model is guided; a scale of 1 = not at all.

    `scale`: away from the model without its label; `guide_scale`: away from the denoiser `guide`, a worse model. Both
    only at levels within `interval`. `rescale` in 0 to 1 and `threshold`, a quantile: see `diffkit.core.guidance`.
    """

    scale: float = 1.0
    guide: Denoiser | None = None
    guide_scale: float = 1.0
    interval: tuple[float, float] = ALWAYS
    rescale: float = 0.0
    threshold: float | None = None


@dataclass(frozen=True)
class Plan:
    """How images are made. `sigmas`: noise levels, falling, the last 0; `mean`: the data's colour, per channel;
    `resample`: passes over each stretch of the grid where a part of the image is kept; `strength`: where on the
    schedule the grid begins, 1 = at its top; `names`: sampler and grid as words, for the record."""

    sampler: SamplerFunction
    sigmas: Sequence[float]
    mean: Sequence[float]
    guidance: Guidance = Guidance()
    seed: int = 0
    resample: int = 1
    strength: float = 1.0
    names: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Given:
    """What is given of the images of a batch, a row each, on the CPU; all of it may be None.

    label [B, K]; image [B, C', H, W]: the conditioning image. source [B, C, H, W] in [-1, 1]: begin with it under noise
    of the plan's first level, instead of with the mean colour. mask [B, 1, H, W]: 0 where the source stays as it is.
    noise [B, C, H, W]: of unit variance, in place of the seed's.
    """

    label: Tensor | None = None
    image: Tensor | None = None
    source: Tensor | None = None
    mask: Tensor | None = None
    noise: Tensor | None = None

    def to(self, device: torch.device) -> Given:
        """All of it on the device."""
        there = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **there)


NOTHING = Given()
Asked: TypeAlias = "Callable[[Sequence[int]], Given]"
"""From the indices of a batch's images to what is given of them."""


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
    asked: Asked = lambda indices: NOTHING,
    *,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
) -> Iterator[Images]:
    """Make image number i for each i of `indices`, yielding batch by batch.

    An image depends on the seed, its index, what is given of it and the plan only. `size` (height, width) beyond the
    spec's: in overlapping tiles. `batch_size`: images at once, or fewer if the memory does not hold them.
    """

    def made(some: slice) -> Images:
        chosen = list(indices[some])
        counted, steps = _begun(denoiser, spec, plan, chosen, asked(chosen), size)
        last = deque(steps, maxlen=1)
        return Images(encode(last[0]).cpu().numpy(), chosen, counted.calls)

    yield from Pieces(batch_size)(made, len(indices))


def trajectory(
    denoiser: Denoiser,
    spec: ImageSpec,
    plan: Plan,
    indices: Sequence[int],
    asked: Asked = lambda indices: NOTHING,
) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
    """The same images after each step, with its noise level s: uint8 [B, H, W, C].

    An image at level s is shown as mean + (x - mean) / (1 + s^2)^1/2, so that noise does not outshine it.
    """
    _, steps = _begun(denoiser, spec, plan, list(indices), asked(indices), None)
    mean = torch.tensor(plan.mean, dtype=torch.float32)[:, None, None]
    for s, x in zip(plan.sigmas[1:], steps, strict=True):
        shown = mean + (x.cpu() - mean) / math.sqrt(1 + s * s)
        yield s, encode(shown).numpy()


def invert(denoiser: Denoiser, plan: Plan, given: Given) -> Tensor:
    """The noise of unit variance [B, C, H, W] from which the plan, sampled, makes `given.source` again.

    The sampler runs up the grid from its lowest level, where the source is taken to lie (DDIM inversion: Song et al.
    2021, section 4.3; for any deterministic sampler).
    """
    device = next(denoiser.network.parameters()).device
    given = given.to(device)
    assert given.source is not None
    rising = [s for s in reversed(plan.sigmas) if s > 0]
    denoise = _denoiser(_Counted(denoiser), plan, replace(given, mask=None), None)
    positions = torch.arange(len(given.source), device=device)
    (x,) = deque(_steps(replace(plan, sigmas=rising), denoise, given.source, positions), maxlen=1)
    return (x - _middle(denoiser, plan, given)) / rising[-1]


def _begun(
    denoiser: Denoiser, spec: ImageSpec, plan: Plan, indices: list[int], given: Given, size: tuple[int, int] | None
) -> tuple[_Counted, Iterator[Tensor]]:
    """The denoiser, which counts its calls, and the steps that the sampler will take with it."""
    device = next(denoiser.network.parameters()).device
    positions, given = torch.tensor(indices, device=device), given.to(device)
    shape = (spec.channels, *(size or (spec.height, spec.width)))
    counted = _Counted(denoiser)
    denoise = _denoiser(counted, plan, given, (spec.height, spec.width) if size else None)
    noise = normal(plan.seed, Purpose.START_NOISE, positions, shape) if given.noise is None else given.noise
    middle = _middle(denoiser, plan, given)
    begin = given.source if given.source is not None and given.mask is None else middle
    if given.source is not None and given.mask is not None:
        # What is kept lies under the same noise as the rest; where a start is made anew, the source tells nothing.
        anew = given.source if plan.strength < 1 else middle
        begin = torch.where(given.mask > 0, anew, given.source)
    return counted, _steps(plan, denoise, begin + plan.sigmas[0] * noise, positions, kept=given.mask is not None)


def _middle(denoiser: Denoiser, plan: Plan, given: Given) -> Tensor:
    """What lies under the first noise: the data's colour or, where images lie near what is shown, that."""
    if denoiser.near and given.image is not None:
        return denoiser.base({"image": given.image}, len(plan.mean))
    device = next(denoiser.network.parameters()).device
    return torch.tensor(plan.mean, device=device, dtype=torch.float32)[:, None, None]


def _denoiser(counted: _Counted, plan: Plan, given: Given, tile: tuple[int, int] | None) -> Denoise:
    """Guidance, rescaling, thresholding, then what is kept; each only if it is wanted."""
    guidance = plan.guidance
    image = {} if given.image is None else {"image": given.image}
    condition = image if given.label is None else {**image, "label": given.label}
    denoise = tiled(counted.under, condition, tile)
    options: dict[str, Any] = {"interval": guidance.interval, "rescale": guidance.rescale}
    if given.label is not None and bool(given.label.any()):
        unlabelled = tiled(counted.under, {**image, "label": torch.zeros_like(given.label)}, tile)
        denoise = guided(denoise, unlabelled, guidance.scale, **options)
    if guidance.guide is not None:
        worse = tiled(_Counted(guidance.guide, counted).under, condition, tile)
        denoise = guided(denoise, worse, guidance.guide_scale, **options)
    if guidance.threshold is not None:
        denoise = thresholded(denoise, guidance.threshold)
    if given.mask is not None:
        assert given.source is not None
        denoise = kept(denoise, given.source, given.mask)
    return denoise


def _steps(plan: Plan, denoise: Denoise, x: Tensor, positions: Tensor, kept: bool = False) -> Iterator[Tensor]:
    """The sampler's steps, each in inference mode (which must not be held across a yield)."""
    shape, drawn = tuple(x.shape[1:]), 0
    path = Path(lambda numbers: normals(plan.seed, Purpose.BROWNIAN, positions, shape, numbers), plan.sigmas)

    def noise(s: float, s_next: float) -> Tensor:
        nonlocal drawn
        # With several passes over one stretch, each has noise of its own.
        along = path.noise(s, s_next) if s_next > 0 and plan.resample == 1 else None
        if along is not None:
            return along
        drawn += 1
        return normal(plan.seed, Purpose.STEP_NOISE, positions, shape, drawn - 1)

    sampler = resampled(plan.sampler, plan.resample) if kept and plan.resample > 1 else plan.sampler
    steps = sampler(denoise, x, plan.sigmas, noise)
    while True:
        with torch.inference_mode():
            state = next(steps, None)
        if state is None:
            return
        yield state


class _Counted:
    """A denoiser that counts network calls, its own or, together with those, another's."""

    def __init__(self, denoiser: Denoiser, together: _Counted | None = None) -> None:
        self.denoiser, self.together, self.calls = denoiser, together or self, 0

    def under(self, x: Tensor, s: float | Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The estimate under a condition."""
        self.together.calls += 1
        return self.denoiser(x, s, condition)
