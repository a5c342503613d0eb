"""Checks of feature extractors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffkit.testing.signature import check_signature, expectations

if TYPE_CHECKING:
    from torch import nn


def check_extractor(function: Callable[..., nn.Module], /, **options: Any) -> None:
    """A feature extractor `(*, options) -> nn.Module`, `forward(images uint8 [B, 3, H, W]) -> float32 [B, D]`.

    One D for images of any size; finite; the same features for an image whatever the batch, and at every call; others
    for another image; no gradients.
    """
    import torch
    from torch import nn

    expect = expectations(function)
    check_signature(expect, function, 0, options)
    network = function(**options)
    expect(isinstance(network, nn.Module), "a torch.nn.Module", type(network).__name__)
    generator = torch.Generator().manual_seed(0)
    widths = set()
    for height, width in ((32, 32), (48, 40)):
        images = torch.randint(0, 256, (3, 3, height, width), generator=generator, dtype=torch.uint8)
        found = network(images)
        shape = tuple(found.shape)
        expect(found.ndim == 2 and len(found) == 3 and found.dtype == torch.float32, "float32 [3, D]", shape)
        expect(not found.requires_grad, "no gradients (requires_grad_(False))", "features with a gradient")
        expect(bool(torch.isfinite(found).all()), "finite features", "NaN or infinity")
        expect(torch.equal(network(images), found), "the same at every call (eval())", "other features")
        scale = float(found.abs().max())
        alone = torch.cat([network(image[None]) for image in images])
        off = float((alone - found).abs().max())
        expect(off <= 1e-3 * scale, "the same features for an image alone as in a batch", f"a difference of {off:.2g}")
        apart = float((found[0] - found[1]).abs().max())
        expect(apart > 1e-3 * scale, "other features for another image", "the same")
        widths.add(shape[1])
    expect(len(widths) == 1, "the same number of features for images of any size", sorted(widths))
