"""Editing with one's own model: back to noise and forth again, and from one picture to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from diffkit.compose.model import Model
from diffkit.compose.wishes import Wishes
from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.engine.sample import Images, Plan


def inverted(model: Model, plan: Plan, wishes: Wishes, count: int) -> Iterator[Tensor]:
    """For each batch of the first `count` of `wishes.sources`, the noise [B, C, H, W] that leads back to them.

    Raises DiffkitError for a sampler that adds noise: it cannot be run backwards.
    """
    from diffkit.core.editing import adds_noise
    from diffkit.engine.pieces import Pieces
    from diffkit.engine.sample import invert

    if adds_noise(plan.sampler):
        raise DiffkitError(
            f"The sampler {plan.names['sampler']} adds noise, so it cannot be run backwards.",
            "Take one that does not: --sampler heun, or euler.",
        )
    wishes = model.wishes(wishes)
    indices = range(count)
    pieces = Pieces(model.default_batch)
    yield from pieces(lambda some: invert(model.denoiser, plan, wishes(indices[some])).cpu(), count)


def interpolated(
    model: Model, plan: Plan, noises: Sequence[Tensor], labels: Sequence[Tensor], frames: int, *, loop: bool = False
) -> Iterator[Images]:
    """From each noise [C, H, W] with its label [K] to the next in `frames` steps, batch by batch; back to the first
    with `loop`."""
    import torch

    from diffkit.core.editing import between

    pairs = list(zip(noises, labels, strict=True))
    pairs = [*pairs, pairs[0]] if loop else pairs
    ways, mixed = [], []
    for (noise, label), (next_noise, next_label) in pairwise(pairs):
        for number in range(frames):
            ways.append(between(noise, next_noise, number / frames))
            mixed.append(label.lerp(next_label, number / frames))
    if not loop:
        ways.append(pairs[-1][0])
        mixed.append(pairs[-1][1])
    wishes = Wishes(torch.stack(mixed) if model.spec.label_width else None, noise=torch.stack(ways))
    return model.generate(plan, range(len(ways)), wishes)


def start_noise(model: Model, seed: int) -> Tensor:
    """The noise [C, H, W] from which image 0 of this seed is made."""
    import torch

    from diffkit.core.random import Purpose, normal

    spec = model.spec
    return normal(
        seed, Purpose.START_NOISE, torch.zeros(1, dtype=torch.int64), (spec.channels, spec.height, spec.width)
    )[0]
