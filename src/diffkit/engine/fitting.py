"""One image to the size of the data set: aspect ratio kept, nothing larger than needed ever decoded."""

from __future__ import annotations

import hashlib
import math
import threading
from contextlib import nullcontext

import numpy as np
from PIL import Image

from diffkit.datasets.deep import WHITE_LEVEL
from diffkit.datasets.imagefile import Color
from diffkit.datasets.pixels import Box, Samples, load, orientation
from diffkit.engine.store import Pixels

_HUGE = 32_000_000
_one_huge_image = threading.Lock()


def fit(
    image: Image.Image,
    height: int,
    width: int,
    channels: int,
    crop: str,
    background: Color,
    key: str,
    white_level: int = WHITE_LEVEL,
) -> tuple[Pixels, int, int]:
    """Pixels uint8 [height, width, channels], and the width and height of the upright original.

    crop "center" and "random" cover the frame (random: at a position drawn from `key`); "pad" fits inside it,
    on `background`. Raises RejectedImage.
    """
    original = draft(image, (width, height), cover=crop != "pad")
    # One huge image at a time: decoding a hundred megapixels in every thread would exhaust the memory.
    with _one_huge_image if image.size[0] * image.size[1] > _HUGE else nullcontext():
        samples = load(image, white_level)
        return fitted(samples, height, width, channels, crop, background, key), *(original or samples.upright_size)


def fitted(samples: Samples, height: int, width: int, channels: int, crop: str, background: Color, key: str) -> Pixels:
    """Decoded samples as pixels uint8 [height, width, channels]."""
    if crop == "pad":
        small = _pad(samples, width, height, channels, background)
    else:
        box = _cover(samples.upright_size, width, height, _position(crop, key))
        small = samples.resized((width, height), box, channels, background)
    return np.asarray(small).reshape(height, width, channels)


def draft(image: Image.Image, frame: tuple[int, int], *, cover: bool) -> tuple[int, int] | None:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8, while it stays at least twice as large as it is needed.

    frame: width and height of the upright image. Returns the width and height of the upright original; None if the
    image will be decoded in full.
    """
    if image.format not in {"JPEG", "MPO"}:
        return None
    turned = orientation(image) > 4
    original = image.size
    ratios = [wanted / have for wanted, have in zip(frame[::-1] if turned else frame, original, strict=True)]
    scale = 2 * (max(ratios) if cover else min(ratios))
    if scale <= 0.5:
        image.draft(None, (math.ceil(scale * original[0]), math.ceil(scale * original[1])))
    if image.size == original:
        return None
    return original[::-1] if turned else original


def _position(crop: str, key: str) -> tuple[float, float]:
    """Where the frame lies along each axis, 0 to 1; a random place is a pure function of `key`."""
    if crop != "random":
        return 0.5, 0.5
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64, int.from_bytes(digest[8:16], "big") / 2**64


def _cover(size: tuple[int, int], width: int, height: int, position: tuple[float, float]) -> Box:
    """The part of an image that fills the frame: scale until it is full, cut what hangs over."""
    scale = max(width / size[0], height / size[1])
    across, down = min(width / scale, size[0]), min(height / scale, size[1])
    left, top = (size[0] - across) * position[0], (size[1] - down) * position[1]
    return left, top, min(left + across, size[0]), min(top + down, size[1])


def _pad(samples: Samples, width: int, height: int, channels: int, background: Color) -> Image.Image:
    """Scale until it fits inside, in the middle of a frame of the background colour."""
    across, down = samples.upright_size
    scale = min(width / across, height / down)
    size = (
        min(width, max(1, round(across * scale))),
        min(height, max(1, round(down * scale))),
    )
    inside = samples.resized(size, (0, 0, across, down), channels, background)
    canvas = Image.new("RGB", (width, height), background).convert(inside.mode)
    canvas.paste(inside, ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
