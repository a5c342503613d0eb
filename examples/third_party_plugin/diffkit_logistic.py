"""A noise schedule for diffkit: log s follows a logistic distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffkit import hookimpl

if TYPE_CHECKING:
    from torch import Tensor


def logistic(t: Tensor, *, median: float = 0.3, scale: float = 0.7) -> Tensor:
    """Like lognormal, with heavier tails; median=1, scale=1 is rectified flow."""
    return median * (t / (1 - t)) ** scale


@hookimpl
def schedules() -> dict[str, str]:
    return {"logistic": "diffkit_logistic:logistic"}
