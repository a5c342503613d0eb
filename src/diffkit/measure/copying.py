"""Is the model copying? How near samples are to training images, against how near real unseen images are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkit.measure.estimate import Estimate, share
from diffkit.measure.manifold import nearest

NEIGHBOURS = 50
QUANTILE = 0.01
ACCEPTED = 0.02


@dataclass(frozen=True)
class Neighbours:
    """For each query the nearest training images: distances [N, K], rising, indices [N, K], and the `ratio` [N].

    The ratio is the distance to the nearest over the mean distance to the following ones (after Carlini et al. 2023):
    about 1 in empty space, near 0 for a copy, whatever the scale of the features.
    """

    distances: Tensor
    indices: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class Copying:
    """`rate`: the share of samples nearer to a training image than `threshold`, which 1 % of the training images
    are to each other; `baseline`: that share of held-out images (None = none were held out). `alarm`: more samples
    than real unseen images would explain."""

    rate: Estimate
    baseline: Estimate | None
    threshold: float
    alarm: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        baseline = None if self.baseline is None else self.baseline.to_dict()
        return {"rate": self.rate.to_dict(), "baseline": baseline, "threshold": self.threshold, "alarm": self.alarm}


def neighbours(queries: Tensor, train: Tensor, *, skip_self: bool = False) -> Neighbours:
    """queries [N, D] among train [M, D]; `skip_self` where both are the same."""
    distances, indices = nearest(queries, train, NEIGHBOURS, skip_self=skip_self)
    return Neighbours(distances, indices, distances[:, 0] / distances[:, 1:].mean(1).clamp(min=1e-12))


def copying(made: Neighbours, among_train: Neighbours, held_out: Neighbours | None) -> Copying:
    """The verdict, from the samples, the training images among each other and the held-out images."""
    threshold = float(torch.quantile(among_train.ratio, QUANTILE))
    rate = _rate("copies", made, threshold)
    baseline = None if held_out is None else _rate("held-out images", held_out, threshold)
    expected = max(ACCEPTED, baseline.high or 0.0) if baseline else ACCEPTED
    return Copying(rate, baseline, threshold, (rate.low or 0.0) > expected)


def _rate(name: str, of: Neighbours, threshold: float) -> Estimate:
    return share(name, int((of.ratio < threshold).sum()), len(of.ratio))
