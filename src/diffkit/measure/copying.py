"""Is the model copying? How near samples are to training images, against how near real images are to one another.

Looked at in two ways: by the extractor's features, which see the same thing in another place, and by pixels at low
resolution, which see what is blurred or too small for the features. A copy in either is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffkit.measure.estimate import Estimate, share
from diffkit.measure.manifold import nearest

NEIGHBOURS = 50
QUANTILE = 0.005
ACCEPTED = 0.02
SIDE = 16
ROWS = 1024


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
class View:
    """One way of looking: the samples', the training images' and the held-out images' nearest training images."""

    made: Neighbours
    among_train: Neighbours
    held_out: Neighbours | None

    @property
    def threshold(self) -> float:
        """The ratio that 0.5 % of all real images, training images among each other and held-out ones, fall below."""
        real = [self.among_train.ratio] + ([self.held_out.ratio] if self.held_out else [])
        return float(torch.quantile(torch.cat(real), QUANTILE))


@dataclass(frozen=True)
class Copying:
    """`rate`: the share of samples that are nearer to a training image than real images are; `baseline`: that share of
    held-out images (None = none were held out); `alarm`: more samples than real unseen images would explain.

    `scores` [N]: how near each sample comes to being a copy, one below 1; `views` [N]: which view says so.
    """

    rate: Estimate
    baseline: Estimate | None
    thresholds: tuple[float, ...]
    alarm: bool
    scores: Tensor
    views: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        baseline = None if self.baseline is None else self.baseline.to_dict()
        figures = {"rate": self.rate.to_dict(), "baseline": baseline, "alarm": self.alarm}
        return {**figures, "thresholds": list(self.thresholds)}


class Pixels(nn.Module):
    """The second view: 16 x 16 averages of the pixels, of mean 0 and norm 1."""

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 [B, 3, H, W] -> float32 [B, 768]."""
        small = functional.adaptive_avg_pool2d(images.float(), SIDE).flatten(1)
        normal: Tensor = functional.normalize(small - small.mean(1, keepdim=True))
        return normal


def mirrored(pixels: Tensor) -> Tensor:
    """What `Pixels` gives for the mirrored images: training shows them too."""
    return pixels.reshape(-1, 3, SIDE, SIDE).flip(-1).flatten(1)


def neighbours(queries: Tensor, *train: Tensor, skip_self: bool = False) -> Neighbours:
    """queries [N, D] among training images, each in one or more versions [M, D]; `skip_self`: queries are the same."""
    found = [nearest(queries, version, NEIGHBOURS, skip_self=skip_self) for version in train]
    count = found[0][0].shape[1]
    distances, order = torch.cat([each for each, _ in found], 1).sort(1)
    indices = torch.cat([each for _, each in found], 1).gather(1, order)
    if len(train) > 1:
        distances = torch.cat([_once(*rows) for rows in zip(distances.split(ROWS), indices.split(ROWS), strict=True)])
        distances, order = distances.sort(1)
        indices = indices.gather(1, order)
    distances, indices = distances[:, :count], indices[:, :count]
    return Neighbours(distances, indices, distances[:, 0] / distances[:, 1:].mean(1).clamp(min=1e-12))


def _once(distances: Tensor, indices: Tensor) -> Tensor:
    """The distances, infinite where a nearer version of the same image stands further left."""
    repeated = (indices[:, :, None] == indices[:, None, :]).tril(-1).any(2)
    return distances.masked_fill(repeated, torch.inf)


def copying(views: Sequence[View]) -> Copying:
    """The verdict of all views together."""
    thresholds = tuple(view.threshold for view in views)
    scores, which = _nearest([view.made for view in views], thresholds).min(0)
    rate = share("copies", int((scores < 1).sum()), len(scores))
    held_out = [view.held_out for view in views if view.held_out is not None]
    baseline = None
    if held_out:
        unseen = _nearest(held_out, thresholds).amin(0)
        baseline = share("held-out images", int((unseen < 1).sum()), len(unseen))
    expected = max(ACCEPTED, baseline.high or 0.0) if baseline else ACCEPTED
    return Copying(rate, baseline, thresholds, (rate.low or 0.0) > expected, scores, which)


def _nearest(of: Sequence[Neighbours], thresholds: Sequence[float]) -> Tensor:
    """Each view's ratios over its threshold, [V, N]."""
    return torch.stack([each.ratio / threshold for each, threshold in zip(of, thresholds, strict=True)])
