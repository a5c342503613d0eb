"""The Laplace noise schedule for diffkit: most training where signal and noise are equally strong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from diffkit import hookimpl
from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    from torch import Tensor

__version__ = "0.1.0"


def laplace(t: Tensor, *, mu: float = 0.0, b: float = 0.5) -> Tensor:
    """log-SNR follows a Laplace distribution of location `mu` and scale `b` (Hang et al. 2024, table 1).

    "Improved Noise Schedule for Diffusion Training", arXiv 2407.03297, in its own letters, falling in t:
    `lambda = mu - b * sign(0.5 - t) * log(1 - 2 * |t - 0.5|)`. With lambda = -2 log s that is
    `s = exp(-mu / 2) * (2 t)^(b / 2)` up to t = 1/2 and `s = exp(-mu / 2) * (2 (1 - t))^(-b / 2)` above.
    A larger `mu` means less noise, a larger `b` a wider spread. Raises DiffkitError unless b > 0.
    """
    if not b > 0:
        raise DiffkitError(f"laplace: the scale b must be above 0, not {b}.", "The paper uses 0.5.")
    # One of the two is 1; 1 - t is exact where it counts, so both ends keep their precision.
    rising, falling = 2 * t.clamp(max=0.5), 2 * (1 - t.clamp(min=0.5))
    return math.exp(-mu / 2) * (rising / falling) ** (b / 2)


@hookimpl
def schedules() -> dict[str, str]:
    """The name that users write, and where the function is."""
    return {"laplace": "diffkit_laplace:laplace"}
