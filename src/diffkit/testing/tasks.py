"""Checks of image-to-image tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffkit.testing.signature import check_signature, expectations

if TYPE_CHECKING:
    from torch import Tensor


def check_task(function: Callable[..., Tensor], /, **options: Any) -> None:
    """An image-to-image task `(images, draw, mask, *, options) -> conditioning image [B, C', H, W]`.

    float32 of the images' height and width, with a number of channels that depends on theirs alone; finite; an image's
    own whatever its company; the same at every call with the same draws; nothing given is changed. With `takes_mask`,
    what lies under the mask cannot be seen in the answer.
    """
    import torch

    expect = expectations(function)
    check_signature(expect, function, 3, options)
    generator = torch.Generator().manual_seed(0)
    masks = bool(getattr(function, "takes_mask", False))
    for channels, height, width in ((3, 16, 16), (1, 16, 24)):
        images = torch.rand(3, channels, height, width, generator=generator) * 2 - 1
        table = torch.rand(3, 256, generator=generator, dtype=torch.float64)

        def run(rows: list[int], mask: Tensor | None = None, images: Tensor = images, table: Tensor = table) -> Tensor:
            return function(images[rows], lambda count: table[rows, :count], mask, **options)

        before = images.clone()
        found = run([0, 1, 2])
        shape = list(found.shape)
        expect(shape[:1] + shape[2:] == [3, height, width], f"[3, C', {height}, {width}]", shape)
        expect(found.dtype == torch.float32, "float32", found.dtype)
        expect(bool(torch.isfinite(found).all()), "finite values", "NaN or infinity")
        expect(torch.equal(run([0, 1, 2]), found), "the same for the same draws", "something else")
        alone = torch.cat([run([row]) for row in range(3)])
        expect(torch.allclose(alone, found, atol=1e-5), "the same for an image alone as in a batch", "something else")
        expect(torch.equal(images, before), "the images left as they were", "changed in place")
        if masks:
            mask = (torch.rand(3, 1, height, width, generator=generator) < 0.5).float()
            hidden = images * (1 - mask) + mask
            same = torch.equal(run([0, 1, 2], mask, images), run([0, 1, 2], mask, hidden))
            expect(same, "nothing to be seen of what lies under the mask", "a difference")
