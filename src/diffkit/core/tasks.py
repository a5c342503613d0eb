"""Image-to-image tasks: what a network is shown of the image that it shall make.

Each is a function `(images [B, C, H, W], draw, mask, *, options) -> conditioning image [B, C', H, W]`. `images` are the
data set's paired inputs where it has some, else its own images; when sampling, what the user gives. `draw(n)` gives
[B, n] numbers in (0, 1), `mask` [B, 1, H, W] is 1 where the image is to be made anew, None in training. Attributes of a
function: `near`, the image lies near what is shown of it, and the difference is learned; `takes_mask`; `needs_pairs`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Draw = Callable[[int], Tensor]
RECTANGLES = 4
LUMA = (0.299, 0.587, 0.114)


def super_resolution(images: Tensor, draw: Draw, mask: Tensor | None, *, factor: int = 4) -> Tensor:
    """From an image `factor` times smaller: means of factor x factor pixels, enlarged again by cubic interpolation."""
    small = F.avg_pool2d(images, factor, ceil_mode=True, count_include_pad=False)
    return F.interpolate(small, images.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)


def inpaint(images: Tensor, draw: Draw, mask: Tensor | None) -> Tensor:
    """From an image with holes: its pixels, mid-gray in the holes, and the mask as one more channel.

    In training the holes are up to four rectangles of a tenth to seven tenths of each side.
    """
    if mask is None:
        mask = _rectangles(images, draw(5 * RECTANGLES))
    return torch.cat([images * (1 - mask), mask], dim=1)


def colorize(images: Tensor, draw: Draw, mask: Tensor | None) -> Tensor:
    """From a gray image (ITU-R BT.601 luma)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, channel : channel + 1] for channel in range(3))
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def translate(images: Tensor, draw: Draw, mask: Tensor | None) -> Tensor:
    """From the paired image, as it is."""
    return images


super_resolution.near = True  # type: ignore[attr-defined]
colorize.near = True  # type: ignore[attr-defined]
inpaint.takes_mask = True  # type: ignore[attr-defined]
translate.needs_pairs = True  # type: ignore[attr-defined]


def _rectangles(images: Tensor, uniform: Tensor) -> Tensor:
    """[B, 1, H, W]: 1 inside; the first rectangle always counts, each further one half of the time."""
    height, width = images.shape[-2:]
    there, top, left, tall, wide = uniform.reshape(len(images), RECTANGLES, 5).to(images).unbind(-1)
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width

    def inside(places: Tensor, start: Tensor, size: Tensor) -> Tensor:
        size = 0.1 + 0.6 * size
        start = start * (1 - size)
        return (places > start[..., None]) & (places < (start + size)[..., None])

    drawn = inside(rows, top, tall)[..., :, None] & inside(columns, left, wide)[..., None, :]
    counted = (there < 0.5) | (torch.arange(RECTANGLES, device=images.device) == 0)
    return (drawn & counted[..., None, None]).any(1, keepdim=True).to(images)
