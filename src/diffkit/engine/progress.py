"""What a training says of its steps: means since the last report, and each loss that was not finite."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from diffkit.engine.gradients import SHARES
from diffkit.errors import DiffkitError, ExitCode

OnNan: TypeAlias = Literal["abort", "skip", "rollback"]
"""What follows a step whose loss or gradient norm is not finite: the training ends; the step's update is left out; or
the training goes back to its last checkpoint and on from there without the step's batch."""
POLICIES: tuple[OnNan, ...] = ("abort", "skip", "rollback")
MOST_SKIPPED = 10
"""Steps in a row without an update, after which the training ends."""
MOST_ROLLBACKS = 3


@dataclass(frozen=True)
class Progress:
    """One step done. `loss` and `grad_norm` are means since the last report, on reports only (else None).

    So is `by_level`: the error, before any weighting, in eight equal shares of the training's noise levels, from the
    lowest up; None where no image fell. Steps that were not finite do not count; a report of such alone is none.
    """

    images_seen: int
    step: int
    lr: float
    loss: float | None = None
    grad_norm: float | None = None
    images_per_second: float = 0.0
    data_wait: float = 0.0
    by_level: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class NonFinite:
    """Something of a step, or of the held-out loss after it, was not finite; and what was done about it.

    `name` and `value`: "the loss" and nan; `first`: where the step's batch begins in the stream of images, None if it
    is of no batch; `images_seen`: where the training is now; `examples`: names of the batch's images, where known.
    """

    images_seen: int
    step: int
    name: str
    value: float
    action: OnNan
    first: int | None = None
    examples: tuple[str, ...] = ()


class Diverged(DiffkitError):
    """Something was not finite, and the training does not go on as it is (exit code 6).

    `tried`: a sentence about what a policy did before it gave up.
    """

    def __init__(self, found: NonFinite, tried: str = "") -> None:
        what = f"Training diverged: at step {found.step:,} {found.name} is no longer finite ({found.value})."
        super().__init__(
            f"{what} {tried}".rstrip(),
            "Try a smaller learning rate.",
            code=ExitCode.NON_FINITE,
        )
        self.found, self.tried = found, tried


class Report:
    """The steps since the last report, kept on the device so that a step never waits for it.

    `busy` is time inside the loop, in seconds: what the caller does between steps does not count.
    """

    def __init__(self) -> None:
        self._found: list[Tensor] = []
        self._steps: list[int] = []
        self.busy, self.waited = 0.0, 0.0
        self._skipped = 0

    def add(self, step: int, loss: Tensor, by_level: Tensor, grad_norm: Tensor) -> None:
        self._steps.append(step)
        self._found.append(torch.cat([torch.stack([loss, grad_norm]), by_level.flatten()]))

    def read(self, now: Progress, batch_size: int, seconds: float, on_nan: OnNan) -> tuple[Progress, list[NonFinite]]:
        """`now` with the means of the finite steps since the last report, and the others.

        Raises Diverged if there is one and `on_nan` does not pass over it, or if there are too many in a row.
        """
        if not self._steps:
            return now, []
        start = time.perf_counter()
        rows = torch.stack(self._found).tolist()
        finite, others = [], []
        for step, (loss, grad_norm, *levels) in zip(self._steps, rows, strict=True):
            if math.isfinite(loss) and math.isfinite(grad_norm):
                finite.append((loss, grad_norm, *levels))
                self._skipped = 0
                continue
            named = ("the norm of the gradients", grad_norm) if math.isfinite(loss) else ("the loss", loss)
            found = NonFinite(now.images_seen, step, *named, on_nan, (step - 1) * batch_size)
            self._skipped += 1
            if on_nan != "skip":
                raise Diverged(found)
            if self._skipped == MOST_SKIPPED:
                raise Diverged(found, f"So were the {MOST_SKIPPED - 1} steps before it, which were skipped.")
            others.append(found)
        busy = self.busy + seconds + time.perf_counter() - start
        if finite:
            loss, grad_norm, *levels = (sum(column) / len(finite) for column in zip(*finite, strict=True))
            now = replace(
                now,
                loss=loss,
                grad_norm=grad_norm,
                images_per_second=len(self._steps) * batch_size / busy,
                data_wait=self.waited / busy,
                by_level=tuple(
                    total / count if count else None
                    for total, count in zip(levels[:SHARES], levels[SHARES:], strict=True)
                ),
            )
        self._found, self._steps = [], []
        self.busy, self.waited = 0.0, 0.0
        return now, others
