"""Any image that a user brings, decoded to pixels: here, in this process. See `decoders` for the bounds around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from diffkit.datasets.deep import WHITE_LEVEL
from diffkit.datasets.imagefile import WHITE, Color, RejectedImage, open_image, rejecting
from diffkit.datasets.pixels import is_gray, load
from diffkit.engine.fitting import draft, fitted
from diffkit.engine.store import Pixels

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike


@dataclass(frozen=True)
class Frame:
    """How an image is decoded.

    height, width: the size to bring it to, or both 0 for its own. crop: "center", "random" (a place fixed by `key`) or
    "pad". repeat: an image that is an exact fraction of the frame is enlarged by repeating its pixels. background: RGB
    under transparency and around padding. min_side: images with a shorter side are rejected. white_level: the 16-bit
    sample that means white.
    """

    channels: int
    height: int = 0
    width: int = 0
    crop: str = "center"
    background: Color = WHITE
    key: str = ""
    repeat: bool = False
    min_side: int = 0
    white_level: int = WHITE_LEVEL


class Decoded(NamedTuple):
    """Pixels uint8 [H, W, C] and their sha256, and of the upright original: its width and height, whether the file says
    that it is gray, and the largest of its 16-bit samples (0 = it has 8 bits). `several`: it was the first of several
    frames or pages."""

    pixels: Pixels
    width: int
    height: int
    gray: bool
    peak: int
    sha256: str
    several: bool = False


Answer: TypeAlias = Decoded | bool | RejectedImage
"""What became of a request: pixels, or whether the image says that it is gray, or why it cannot be used."""


def answer(image: ImageLike, frame: Frame | None) -> Answer:
    """Decode an image or, without a frame, look at its header."""
    try:
        return looks_gray(image) if frame is None else decode(image, frame)
    except RejectedImage as error:
        return error


def decode(image: ImageLike, frame: Frame) -> Decoded:
    """Open and decode one image. Raises RejectedImage."""
    with rejecting(), opened(image) as source:
        if min(source.size) < frame.min_side:
            raise RejectedImage(f"too small: {source.size[0]}x{source.size[1]}")
        gray = is_gray(source)
        height, width = frame.height, frame.width
        original = draft(source, (width, height), cover=frame.crop != "pad") if height else None
        samples = load(source, frame.white_level)
        size = samples.upright_size
        times = _times(size, frame)
        if times:
            whole = np.asarray(samples.whole(frame.channels, frame.background)).reshape(*size[::-1], frame.channels)
            pixels = whole.repeat(times, axis=0).repeat(times, axis=1)
        else:
            pixels = fitted(samples, height, width, frame.channels, frame.crop, frame.background, frame.key)
        pixels = np.ascontiguousarray(pixels)
        found = sha256(pixels.data).hexdigest()
        return Decoded(pixels, *(original or size), gray, samples.peak, found, _has_several(source))


def looks_gray(image: ImageLike) -> bool:
    """Whether an image says that it has no colour, from its header alone. Raises RejectedImage."""
    with rejecting(), opened(image) as source:
        return is_gray(source)


def opened(image: ImageLike) -> AbstractContextManager[Image.Image]:
    """Whatever a source gave, as a Pillow image; `with` closes it if it was opened here. Raises RejectedImage."""
    if isinstance(image, Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return nullcontext(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (1,), (3,)) or image.size == 0:
            raise RejectedImage(f"not an image: an array {image.dtype} {image.shape}")
        return nullcontext(Image.fromarray(image if image.shape[2:] != (1,) else image[..., 0]))
    return image()


def _has_several(image: Image.Image) -> bool:
    """Whether more frames or pages follow; previews that cameras put behind a JPEG do not count.

    It may have to look at the second one, so ask when the pixels of the first are done with.
    """
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # the second is damaged, which is no fault of the first
        return True


def _times(size: tuple[int, int], frame: Frame) -> int:
    """How often each pixel is repeated along each axis; 0 where the image is resampled instead."""
    width, height = size
    if not frame.height:
        return 1
    if frame.repeat and frame.height % height == 0 and frame.width % width == 0:
        across, down = frame.width // width, frame.height // height
        return across if across == down else 0
    return 0
