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


def student95(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Fisher and Cornish 1960); within 0.002 from 6 degrees of freedom on."""
    z, v = Z95, degrees
    terms = (
        z,
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return sum(terms)
