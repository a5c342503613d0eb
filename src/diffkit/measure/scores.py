"""All figures of one comparison: how far are the made images from the real ones?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.core.random import permutation
from diffkit.errors import DiffkitError, ExitCode
from diffkit.measure.estimate import Estimate
from diffkit.measure.frechet import LEAST_PER_DIMENSION, enough, frechet, frechet_interval
from diffkit.measure.images import spread
from diffkit.measure.kernel import kernel_distance
from diffkit.measure.manifold import NEIGHBOURS, fidelity

LEAST = 20


@dataclass(frozen=True)
class Names:
    """What the two distances are called: after their features ("FID" and "KID" with Inception's only)."""

    frechet: str
    kernel: str


def scores(real: Tensor, made: Tensor, names: Names) -> Iterator[Estimate | None]:
    """Every figure for features real [N, D] and made [M, D], as soon as it is there; None in between marks progress.

    What depends on the number of images is taken at equal numbers. Raises DiffkitError for fewer than 20 images.
    """
    check_count(len(real), "real")
    check_count(len(made), "made")
    equal = min(len(real), len(made))
    few_real, few_made = at_most(real, equal), at_most(made, equal)
    yield _raw(names, few_real, few_made)
    if enough(few_real, few_made):
        yield from frechet_interval(f"{names.frechet} corrected", few_real, few_made)
    yield kernel_distance(names.kernel, real, made)
    if equal > NEIGHBOURS:
        yield from fidelity(few_real, few_made)


METRICS = ("kid", "frechet")


def score(metric: str, real: Tensor, made: Tensor, names: Names) -> Estimate:
    """One distance only: "kid", comparable at any number of images, or "frechet", at equal numbers."""
    check_count(len(made), "made")
    if metric == "kid":
        return kernel_distance(names.kernel, real, made)
    equal = min(len(real), len(made))
    few_real, few_made = at_most(real, equal), at_most(made, equal)
    if enough(few_real, few_made):
        *_, corrected = frechet_interval(f"{names.frechet} corrected", few_real, few_made)
        assert corrected is not None
        return corrected
    return _raw(names, few_real, few_made)


def halves(real: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Two parts of the real features, of `count` rows or half of all; None if that is too few."""
    half = min(count, len(real) // 2)
    if half < LEAST:
        return None
    shuffled = real[permutation(0, 0, len(real))]
    return shuffled[:half], shuffled[half : 2 * half]


def floor(real: Tensor, count: int, names: Names) -> list[Estimate]:
    """What a perfect model would get: the distances of two parts of the real data, of `count` images or half of all."""
    parts = halves(real, count)
    if parts is None:
        return []
    return [_raw(names, *parts), kernel_distance(names.kernel, *parts), *fidelity(*parts)]


def check_count(count: int, what: str) -> None:
    """Raises DiffkitError if a set is too small to say anything about it."""
    if count < LEAST:
        raise DiffkitError(
            f"{count} {what} images are too few to measure anything.",
            f"{LEAST} is the least; some hundreds give useful intervals.",
            code=ExitCode.DATA,
        )


def caution(real: Tensor, made: Tensor, names: Names) -> str:
    """What to keep in mind about the Frechet distance at these numbers; empty if it could be corrected."""
    if enough(real, made):
        return ""
    needed = LEAST_PER_DIMENSION * real.shape[1]
    return (
        f"{names.frechet} grows as images get fewer: compare it with values at the same number only. "
        f"Correcting it takes {needed:,} images of each."
    )


def at_most(features: Tensor, count: int) -> Tensor:
    """`count` rows, spread over all."""
    return features if len(features) <= count else features[torch.from_numpy(spread(len(features), count))]


def _raw(names: Names, real: Tensor, made: Tensor) -> Estimate:
    """The published form of the Frechet distance, which means something at its own number of images only."""
    note = f"at {len(real):,} of each" + ("" if enough(real, made) else ", biased")
    return Estimate(names.frechet, frechet(made, real), note=note)
