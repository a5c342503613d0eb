"""The learning-rate range test: a short training at rising rates (Smith 2017, "Cyclical Learning Rates", 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from diffkit.engine.train import Progress, Reduced
from diffkit.errors import DiffkitError, ExitCode

LOWEST, HIGHEST, RATES, STEPS = 1e-4, 1e-1, 25, 6
WORSE, SAFETY = 1.5, 5.0


Train: TypeAlias = Callable[[float, int], Iterator[Progress | Reduced]]


def range_test(train: Train, batch: int) -> Iterator[tuple[float, float]]:
    """Rates, rising evenly in their logarithm, and the mean unweighted loss of six steps with each, until it explodes.

    `train(lr, images)` trains on at that rate for so many images, in batches of `batch`, and reports at their end.
    """
    lowest = math.inf
    for number in range(RATES):
        lr = LOWEST * (HIGHEST / LOWEST) ** (number / (RATES - 1))
        try:
            events = train(lr, STEPS * batch)
            (last,) = (event for event in events if isinstance(event, Progress) and event.loss is not None)
        except DiffkitError as error:
            if error.code != ExitCode.NON_FINITE:
                raise
            return
        errors = [error for error in last.by_level if error is not None]
        loss = sum(errors) / len(errors)
        yield lr, loss
        lowest = min(lowest, loss)
        if loss > 2 * WORSE * lowest:
            return


def suggested(found: Sequence[tuple[float, float]]) -> float | None:
    """A fifth of the first rate from which on the loss stays above one and a half times its lowest before.

    Two significant digits; None where it never does: then the test says nothing. Raises DiffkitError if there is none.
    """
    if not found:
        raise DiffkitError(
            f"The training diverges at a learning rate of {LOWEST:g} already.",
            "Try --precision float32, or another --prediction.",
            code=ExitCode.NON_FINITE,
        )
    breaks: float | None = None
    for number in range(len(found) - 1, 0, -1):
        lowest = min(loss for _, loss in found[:number])
        if found[number][1] <= WORSE * lowest:
            break
        breaks = found[number][0]
    return None if breaks is None else float(f"{breaks / SAFETY:.1e}")
