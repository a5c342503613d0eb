"""Frechet distance of two sets of features, each taken as a Gaussian (Dowson and Landau 1982, Heusel et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.measure.estimate import Estimate, around, student95

GROUPS = 20
LEAST_PER_DIMENSION = 5
ROWS = 2048


@dataclass(frozen=True)
class Moments:
    """count, sum [D] and sum of outer products [D, D] of features about a common origin, in float64.

    Sums, so that a group of features can be taken away from them.
    """

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor, origin: Tensor) -> Moments:
        """features [N, D]; `origin` [D]: any point near their mean, so that no digits are lost."""
        total, outer = torch.zeros_like(origin), torch.zeros(len(origin), len(origin)).to(origin)
        for rows in features.split(ROWS):
            centred = rows.double() - origin
            total += centred.sum(0)
            outer.addmm_(centred.T, centred)
        return cls(len(features), total, outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]."""
        return (self.outer - torch.outer(self.total, self.mean)) / (self.count - 1)


def frechet(x: Tensor, y: Tensor) -> float:
    """The distance of features x [N, D] and y [M, D], as published: biased upwards, the more the fewer images.

    Compare such values at equal N and M only.
    """
    origin = y.double().mean(0)
    if min(len(x), len(y)) > x.shape[1]:
        return _distance(Moments.of(x, origin), Moments.of(y, origin))
    # Fewer images than dimensions: tr (A B)^1/2 is the sum of the singular values of X Y', which is smaller.
    one, other = (features.double() - features.double().mean(0) for features in (x, y))
    root = float(torch.linalg.svdvals(one @ other.T).sum()) / math.sqrt((len(x) - 1) * (len(y) - 1))
    spread = float(one.square().sum()) / (len(x) - 1) + float(other.square().sum()) / (len(y) - 1)
    shift = float((x.double().mean(0) - origin).square().sum())
    return shift + spread - 2 * root


def frechet_interval(name: str, x: Tensor, y: Tensor, groups: int = GROUPS) -> Iterator[Estimate | None]:
    """The distance of the distributions behind x and y, its bias removed, with a 95 % interval: yielded last.

    A jackknife over groups of both sets (Quenouille 1956, Tukey 1958): the bias of order 1/N goes, and the spread of
    the values without one group gives the variance. It counts the second-order part twice (Efron and Stein 1981), which
    is most of the variance where the distributions are nearly equal: what two groups together change, beyond each
    alone, gives that part. Half of the surplus is taken off; the rest makes up for the variance's own error
    (benchmarks/intervals.py). Needs `enough` images. Yields None after each group.
    """
    origin = y.double().mean(0)
    all_x, all_y = Moments.of(x, origin), Moments.of(y, origin)
    whole = _distance(all_x, all_y)
    without, pairs = [], []
    left_x, left_y = all_x, all_y
    for number in range(groups):  # every groups-th image, whatever order they came in
        group_x, group_y = (Moments.of(features[number::groups], origin) for features in (x, y))
        without.append(_distance(all_x - group_x, all_y - group_y))
        if number % 2:
            both = _distance(left_x - group_x, left_y - group_y)
            pairs.append(groups * whole - (groups - 1) * sum(without[-2:]) + (groups - 2) * both)
        left_x, left_y = all_x - group_x, all_y - group_y
        yield None
    left = torch.tensor(without, dtype=torch.float64)
    value = groups * whole - (groups - 1) * float(left.mean())
    variance = float((groups - 1) * left.var(correction=0))
    second = sum(pair**2 for pair in pairs) / len(pairs) / 2
    yield around(name, value, math.sqrt(max(variance - second / 2, second)), student95(groups - 1))


def enough(x: Tensor, y: Tensor) -> bool:
    """Whether `frechet_interval` can be trusted: at least five images for each dimension in both sets."""
    return min(len(x), len(y)) >= LEAST_PER_DIMENSION * x.shape[1]


def _distance(a: Moments, b: Moments) -> float:
    """|mean difference|^2 + tr(A + B - 2 (A B)^1/2), the root's trace from eigenvalues of a symmetric matrix."""
    first, second = a.covariance, b.covariance
    root, failed = torch.linalg.cholesky_ex(first)
    if int(failed):
        values, vectors = torch.linalg.eigh(first)
        root = vectors * values.clamp(min=0).sqrt()
    roots = torch.linalg.eigvalsh(root.T @ second @ root).clamp(min=0).sqrt()
    trace = float(first.trace() + second.trace() - 2 * roots.sum())
    return float((a.mean - b.mean).square().sum()) + trace
