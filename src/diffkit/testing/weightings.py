"""Checks of loss weightings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffkit.testing.signature import check_signature, expectations

if TYPE_CHECKING:
    from torch import Tensor


def check_weighting(function: Callable[..., Tensor], /, **options: Any) -> None:
    """A loss weighting `(s, density, *, options) -> weights`.

    float64 of the shape of s, finite and not negative from s = 0.001 to 1000, somewhere positive; a level's weight does
    not depend on the other levels, and nothing given is changed.
    """
    import torch

    expect = expectations(function)
    check_signature(expect, function, 2, options)
    s = torch.logspace(-3, 3, 61, dtype=torch.float64)
    density = torch.full_like(s, 0.1)
    before = s.clone(), density.clone()
    weights = function(s, density, **options)
    expect(weights.dtype == torch.float64, "float64 weights", weights.dtype)
    expect(weights.shape == s.shape, f"one weight for each level, {list(s.shape)}", list(weights.shape))
    expect(bool(torch.isfinite(weights).all()), "finite weights", "NaN or infinity")
    expect(bool((weights >= 0).all()), "weights of 0 and more", f"{float(weights.min()):.3g}")
    expect(bool((weights > 0).any()), "some weight above 0", "none")
    alone = torch.cat(
        [function(each, share, **options) for each, share in zip(s[:, None], density[:, None], strict=True)]
    )
    expect(torch.allclose(alone, weights), "the same weight for a level alone", "another")
    unchanged = torch.equal(s, before[0]) and torch.equal(density, before[1])
    expect(unchanged, "s and density left as they were", "changed in place")
