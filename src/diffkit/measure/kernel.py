"""Kernel distance (KID): squared maximum mean discrepancy under the kernel (x.y / D + 1)^3 (Binkowski et al. 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from diffkit.measure.estimate import Z95, Estimate

TILE = 1024
_known = WeakIdKeyDictionary()


@dataclass(frozen=True)
class _Block:
    """Sums over a kernel matrix [N, M]: by row [N], by column [M], and of the squares."""

    rows: Tensor
    columns: Tensor
    squares: float


def kernel_distance(name: str, x: Tensor, y: Tensor) -> Estimate:
    """The unbiased estimate over all pairs of x [N, D] and y [M, D], with a 95 % interval.

    It may be negative: 0 is its mean for equal distributions. The variance is that of the U-statistic by the jackknife
    (Arvesen 1969). It has a part that is there when the distributions are equal, and one that grows in proportion to
    the distance. So the interval holds every distance that the estimate does not contradict (as Wilson's does for a
    proportion): it reaches further up than down. The jackknife counts the first part twice (Efron and Stein 1981); half
    of the surplus stays, to make up for the variance's own error (benchmarks/intervals.py).
    """
    n, m = len(x), len(y)
    xx, yy, xy = _within(x), _within(y), _between(x, y)
    total_xx, total_yy, total_xy = (float(block.rows.sum()) for block in (xx, yy, xy))
    value = total_xx / (n * (n - 1)) + total_yy / (m * (m - 1)) - 2 * total_xy / (n * m)
    jackknife = _jackknife(total_xx, xx.rows, total_xy, xy.rows, m)
    jackknife += _jackknife(total_yy, yy.rows, total_xy, xy.columns, n)
    second = _second_order(xx, n, n, 1) * 2 / (n * (n - 1)) + _second_order(yy, m, m, 1) * 2 / (m * (m - 1))
    second += _second_order(xy, n, m, 0) * 4 / (n * m)
    low, high = _bounds(value, max(jackknife - 1.5 * second, 0.0), second)
    return Estimate(name, value, low, high)


def _bounds(value: float, first: float, second: float) -> tuple[float, float]:
    """The roots d of (value - d)^2 = z^2 (first * d / value + second)."""
    slope = first / max(value, math.sqrt(second), 1e-300) * Z95**2 / 2
    half = math.sqrt(slope**2 + 2 * slope * max(value, 0.0) + Z95**2 * second)
    return value + slope - half, value + slope + half


def _jackknife(own: float, own_rows: Tensor, cross: float, cross_rows: Tensor, others: int) -> float:
    """The jackknife's variance from leaving out each row of one set."""
    n = len(own_rows)
    left = (own - 2 * own_rows) / ((n - 1) * (n - 2)) - 2 * (cross - cross_rows) / ((n - 1) * others)
    return float((n - 1) * left.var(correction=0))


def _second_order(block: _Block, n: int, m: int, diagonal: int) -> float:
    """Mean square of the kernel without the means of its rows and columns; `diagonal` = 1: without its diagonal."""
    pairs = n * (m - diagonal)
    rows, columns = block.rows / (m - diagonal), block.columns / (n - diagonal)
    mean = float(block.rows.sum()) / pairs
    return max(0.0, block.squares / pairs - float(rows.square().mean()) - float(columns.square().mean()) + mean**2)


def _within(x: Tensor) -> _Block:
    """Over pairs of different rows of x; remembered as long as x lives, since real images are compared with often."""
    if x not in _known:
        rows, squares = torch.zeros(len(x), dtype=torch.float64, device=x.device), 0.0
        for here, there, kernel in _tiles(x, x, upper=True):
            rows[here] += kernel.sum(1)
            squares += _squares(kernel) * (1 if there == here else 2)  # the matrix is symmetric
            if there != here:
                rows[there] += kernel.sum(0)
        diagonal = (x.double().square().sum(1) / x.shape[1] + 1) ** 3
        rows -= diagonal
        _known[x] = _Block(rows, rows, squares - float(diagonal.square().sum()))
    found: _Block = _known[x]
    return found


def _between(x: Tensor, y: Tensor) -> _Block:
    rows, columns = (torch.zeros(len(each), dtype=torch.float64, device=each.device) for each in (x, y))
    squares = 0.0
    for here, there, kernel in _tiles(x, y):
        rows[here] += kernel.sum(1)
        columns[there] += kernel.sum(0)
        squares += _squares(kernel)
    return _Block(rows, columns, squares)


def _tiles(x: Tensor, y: Tensor, upper: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """The matrix in tiles, or those on and above its diagonal: which rows of x, which of y, float64 [n, m]."""
    for first in range(0, len(x), TILE):
        for other in range(first if upper else 0, len(y), TILE):
            here, there = slice(first, first + TILE), slice(other, other + TILE)
            yield here, there, _kernel(x[here], y[there])


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T / x.shape[1] + 1).double()
    return base.square().mul_(base)


def _squares(kernel: Tensor) -> float:
    flat = kernel.flatten()
    return float(flat @ flat)
