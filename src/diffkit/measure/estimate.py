"""A measured value with what it may be worth: its 95 % interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """One figure. `low` and `high` bound its 95 % interval, None where none can be given; `note` says for what."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return vars(self).copy()


def around(name: str, value: float, error: float, quantile: float = Z95, note: str = "") -> Estimate:
    """value +- quantile * standard error."""
    return Estimate(name, value, value - quantile * error, value + quantile * error, note)


def share(name: str, hits: float, count: int, note: str = "") -> Estimate:
    """A proportion with Wilson's interval (Wilson 1927), which stays inside [0, 1] and is right for small counts."""
    rate, z2 = hits / count, Z95**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2))
    return Estimate(name, rate, max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half)), note)


def student95(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, by adding up its density; within 0.001 from one degree of freedom on."""
    v, step = degrees, 1e-3
    scale = math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi)
    area = x = 0.0
    while area < 0.475:
        middle = x + step / 2
        area += step * scale * (1 + middle * middle / v) ** (-(v + 1) / 2)
        x += step
    return x
