"""Precision, recall, density and coverage: do the two sets fill the same space?

Kynkaanniemi et al. 2019 (precision, recall) and Naeem et al. 2020 (density, coverage): a set fills the balls around
its members that reach to their k-th nearest neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkit.measure.estimate import Estimate, around, share

NEIGHBOURS = 5
ROWS = 1024


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """[N, D], [M, D] -> [N, M]. Rows should lie about the origin, so that no digits are lost."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squares.clamp_(min=0)


def nearest(x: Tensor, among: Tensor, count: int, *, skip_self: bool = False) -> tuple[Tensor, Tensor]:
    """Distances [N, count], rising, and indices of the nearest rows of `among`; `skip_self` where that is x itself."""
    origin = among.mean(0)
    among = among - origin
    count = min(count, len(among) - skip_self)
    distances, indices = [], []
    for start in range(0, len(x), ROWS):
        squares = squared_distances(x[start : start + ROWS] - origin, among)
        if skip_self:
            rows = torch.arange(len(squares), device=x.device)
            squares[rows, rows + start] = math.inf
        found = squares.topk(count, largest=False)
        distances.append(found.values.sqrt())
        indices.append(found.indices)
    return torch.cat(distances), torch.cat(indices)


def fidelity(real: Tensor, made: Tensor, neighbours: int = NEIGHBOURS) -> list[Estimate]:
    """Precision, recall, density and coverage of `made` [M, D] against `real` [N, D].

    All four depend on N and M: their intervals hold at this N and M only, for other samples from the same model
    (precision, density) or other real images (recall, coverage).
    """
    origin = real.mean(0)
    real, made = real - origin, made - origin
    real_reach = nearest(real, real, neighbours, skip_self=True)[0][:, -1]
    made_reach = nearest(made, made, neighbours, skip_self=True)[0][:, -1]
    reached = covered = 0
    held = torch.zeros(len(made), device=made.device)
    for start in range(0, len(real), ROWS):
        distances = squared_distances(real[start : start + ROWS], made).sqrt()
        within = distances < real_reach[start : start + ROWS, None]
        held += within.sum(0)
        covered += int(within.any(1).sum())
        reached += int((distances < made_reach).any(1).sum())
    inside = held / neighbours
    note = f"at {len(made):,} of each" if len(real) == len(made) else f"at {len(real):,} real, {len(made):,} made"
    error = float(inside.std()) / math.sqrt(len(made))
    return [
        share("precision", int((held > 0).sum()), len(made), note),
        share("recall", reached, len(real), note),
        around("density", float(inside.mean()), error, note=note),
        share("coverage", covered, len(real), note),
    ]
