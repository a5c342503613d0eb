"""One image to the size of the data set: aspect ratio kept, nothing larger than needed ever decoded."""

from __future__ import annotations

import hashlib
import math
import threading
from contextlib import nullcontext

import numpy as np
from PIL import Image

from diffkit.datasets.imagefile import Color, orientation, to_rgb_or_gray
from diffkit.engine.store import Pixels

_HUGE = 32_000_000
_one_huge_image = threading.Lock()


def fit(
    image: Image.Image, height: int, width: int, channels: int, crop: str, background: Color, key: str
) -> tuple[Pixels, int, int]:
    """Pixels uint8 [height, width, channels], and the width and height of the upright original.

    crop "center" and "random" cover the frame (random: at a position drawn from `key`); "pad" fits inside it,
    on `background`. Raises RejectedImage.
    """
    original = image.size
    turned = orientation(image) > 4
    frame = (height, width) if turned else (width, height)
    draft(image, frame, cover=crop != "pad")
    drafted = image.size != original
    # One huge image at a time: decoding a hundred megapixels in every thread would exhaust the memory.
    with _one_huge_image if image.size[0] * image.size[1] > _HUGE else nullcontext():
        upright = to_rgb_or_gray(image, channels, background)
        if crop == "pad":
            fitted = _pad(upright, width, height, background)
        else:
            fitted = _cover(upright, width, height, _position(crop, key))
    if not drafted:
        original = upright.size
    elif turned:
        original = original[::-1]
    return np.asarray(fitted).reshape(height, width, channels), *original


def draft(image: Image.Image, frame: tuple[int, int], *, cover: bool) -> None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, while it stays at least twice as large as it is needed."""
    ratios = [wanted / have for wanted, have in zip(frame, image.size, strict=True)]
    scale = 2 * (max(ratios) if cover else min(ratios))
    if scale <= 0.5:
        image.draft(None, (math.ceil(scale * image.size[0]), math.ceil(scale * image.size[1])))


def _position(crop: str, key: str) -> tuple[float, float]:
    """Where the frame lies along each axis, 0 to 1; a random place is a pure function of `key`."""
    if crop == "center":
        return 0.5, 0.5
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64


def _cover(image: Image.Image, width: int, height: int, position: tuple[float, float]) -> Image.Image:
    """Scale until the frame is full, cut what hangs over; one resampling, straight from a box in floats."""
    scale = max(width / image.size[0], height / image.size[1])
    across, down = min(width / scale, image.size[0]), min(height / scale, image.size[1])
    left, top = (image.size[0] - across) * position[0], (image.size[1] - down) * position[1]
    box = (left, top, min(left + across, image.size[0]), min(top + down, image.size[1]))
    return image.resize((width, height), Image.Resampling.LANCZOS, box)


def _pad(image: Image.Image, width: int, height: int, background: Color) -> Image.Image:
    """Scale until it fits inside, in the middle of a frame of the background colour."""
    scale = min(width / image.size[0], height / image.size[1])
    size = (
        min(width, max(1, round(image.size[0] * scale))),
        min(height, max(1, round(image.size[1] * scale))),
    )
    canvas = Image.new("RGB", (width, height), background).convert(image.mode)
    inside = image.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(inside, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
