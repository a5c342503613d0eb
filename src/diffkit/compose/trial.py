"""A first use of each part with its options, before any work: options that cannot work are errors at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffkit.config import PartChoice
from diffkit.errors import DiffkitError
from diffkit.registry import word

if TYPE_CHECKING:
    from torch import Tensor

MOST_CALLS = 2_000
"""Network calls of the trial of a sampler, over two steps: none that is of use needs as many."""


@contextmanager
def first_use(kind: str, choice: PartChoice) -> Iterator[None]:
    """Turn what a part raises into a DiffkitError that names it; errors about too little memory pass."""
    from diffkit.engine.devices import first_line, is_memory

    try:
        yield
    except (DiffkitError, MemoryError):
        raise
    except SystemExit as error:
        raise _unusable(kind, choice, f"it ends the process (SystemExit: {error})") from error
    except Exception as error:
        if is_memory(error):
            raise
        raise _unusable(kind, choice, first_line(error)) from error


def check_levels(choice: PartChoice, levels: Callable[[Tensor], Tensor]) -> None:
    """Raises DiffkitError unless a schedule's levels are numbers above 0 that never fall."""
    import torch

    with first_use("schedules", choice):
        found = levels(torch.linspace(0, 1, 65, dtype=torch.float64))
        if not bool(torch.isfinite(found).all() and (found > 0).all() and (found.diff() >= 0).all()):
            raise _unusable("schedules", choice, "its noise levels are not rising numbers above 0")


def check_prediction(choice: PartChoice, prediction: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """Raises DiffkitError unless the coefficients of a prediction are finite, and the network counts."""
    import torch

    with first_use("predictions", choice):
        skip, out, inp = prediction(torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64))
        if not all(bool(torch.isfinite(each).all()) for each in (skip, out, inp)) or not bool((out != 0).all()):
            raise _unusable("predictions", choice, "its coefficients are not finite, or take no notice of the network")


def check_sampler(choice: PartChoice, sampler: Callable[..., Any], sigmas: Sequence[float]) -> None:
    """Raises DiffkitError unless a sampler comes from the highest of these noise levels to a finite image."""
    import torch

    calls = 0

    def denoise(x: Tensor, s: float | Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > MOST_CALLS:
            raise _unusable("samplers", choice, f"it takes more than {MOST_CALLS:,} network calls for two steps")
        return x / (1 + torch.as_tensor(s).to(x).reshape(-1, 1, 1, 1) ** 2)

    grid = sorted({sigmas[0], sigmas[len(sigmas) // 2], 0.0}, reverse=True)
    x = torch.full((1, 3, 4, 4), grid[0])
    with first_use("samplers", choice):
        for state in sampler(denoise, x, grid, lambda s, s_next: torch.zeros_like(x)):
            if not bool(torch.isfinite(state).all()):
                raise _unusable("samplers", choice, "what it makes is not finite")


def check_weighting(choice: PartChoice, factors: Tensor) -> None:
    """Raises DiffkitError unless the factors of a weighting are finite, none is negative and some are not 0."""
    import torch

    if not bool(torch.isfinite(factors).all() and (factors >= 0).all() and (factors > 0).any()):
        raise _unusable("weightings", choice, "its factors are not numbers above 0")


def _unusable(kind: str, choice: PartChoice, reason: str) -> DiffkitError:
    return DiffkitError(
        f"The {word(kind)} {choice} cannot be used: {reason}.",
        f"What its options mean: diffkit plugins show {choice.name}.",
    )
