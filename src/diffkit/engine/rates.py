"""A learning rate by trial: short trainings from the same start, on the same images and noise."""

from __future__ import annotations

import math
from collections.abc import Callable

from diffkit.errors import DiffkitError, ExitCode

HALVINGS = 8


def best_rate(loss_at: Callable[[float], float], first: float) -> float:
    """Where the loss is lowest: from `first` on, the rate is halved or doubled until both neighbours are worse.

    Then the vertex of the parabola through the three, over the logarithm of the rate, to two significant digits.
    Halved or doubled eight times at most. A loss that is not finite is worse than any other; if all are, raises
    DiffkitError.
    """
    found: dict[int, float] = {}

    def loss(power: int) -> float:
        if power not in found:
            value = loss_at(first * 2.0**power) if abs(power) <= HALVINGS else math.inf
            found[power] = value if math.isfinite(value) else math.inf
        return found[power]

    best, before = 0, None
    while best != before:
        around = (power for power in (best - 1, best, best + 1) if abs(power) <= HALVINGS)
        before, best = best, min(around, key=loss)  # of equals the lowest rate
    below, here, above = loss(best - 1), loss(best), loss(best + 1)
    if here == math.inf:
        raise DiffkitError(
            f"The training diverges at a learning rate of {first * 2.0**-HALVINGS:.1e} already.",
            "Try --precision float32, or another --prediction.",
            code=ExitCode.NON_FINITE,
        )
    bend = below - 2 * here + above
    shift = (below - above) / (2 * bend) if 0 < bend < math.inf else 0.0
    return float(f"{first * 2.0 ** (best + shift):.1e}")
