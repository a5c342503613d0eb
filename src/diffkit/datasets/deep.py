"""Samples of 16 bits: read in full, where Pillow would keep 8 of them or saturate, and scaled to 8 bits."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin

from diffkit.datasets.imagefile import RejectedImage

WHITE_LEVEL = 65535
_COLOURS = {"RGB": 3, "RGBX": 3, "RGBA": 3, "RGBa": 3, "CMYK": 4, "LA": 1}
_BYTE_ORDERS = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_UNSIGNED, _SIGNED = 1, 2


@dataclass(frozen=True)
class Depth:
    """What 16-bit samples mean: `white` is the value of white, `inverted` files store it as 0.

    `layout` names the samples of a pixel ("L", "LA", "RGB", "RGBA", "RGBa" = multiplied by its alpha, "CMYK").
    """

    layout: str
    white: int = WHITE_LEVEL
    inverted: bool = False

    def to_eight_bits(
        self, high: Image.Image, low: Image.Image | None, transparent: tuple[int, ...] | None
    ) -> tuple[Image.Image, Image.Image | None, int]:
        """The colour in "L", "RGB" or "CMYK", the alpha in "L" (None = opaque), and the largest sample of
        colour where white is 65535."""
        samples = _samples(high, low)
        if self.layout == "LA":
            samples = samples[..., [0, 3]]
        alpha = None
        colours = _COLOURS.get(self.layout, 1)
        if samples.ndim == 3 and samples.shape[2] > colours and self.layout != "RGBX":
            opacity = samples[..., colours]
            alpha = Image.fromarray(_table(WHITE_LEVEL)[opacity])
            if self.layout == "RGBa":
                scaled = samples[..., :colours] * np.float64(WHITE_LEVEL) / np.maximum(opacity, 1)[..., None]
                samples = np.minimum(np.rint(scaled), WHITE_LEVEL).astype(np.uint16)
        elif transparent is not None:
            match = samples == np.array(transparent)
            match = match.all(axis=2) if samples.ndim == 3 else match
            alpha = Image.fromarray(np.where(match, 0, 255).astype(np.uint8))
        if samples.ndim == 3:
            samples = samples[..., :colours]
        peak = int(samples.max()) * WHITE_LEVEL // self.white
        eight = _table(self.white)[samples[..., 0] if self.layout == "LA" else samples]
        if self.inverted:
            eight = 255 - eight
        if self.layout == "CMYK":
            return Image.frombytes("CMYK", high.size, eight.tobytes()), alpha, peak
        return Image.fromarray(eight), alpha, peak


def depth_of(image: Image.Image, rawmode: str, white: int = WHITE_LEVEL) -> Depth | None:
    """What the header says about samples of more than 8 bits; None for images of 8 bits.

    Raises RejectedImage where white or black is not known (floating-point, signed, 32-bit samples), and where Pillow
    cannot read all bits.
    """
    tags = getattr(image, "tag_v2", {})
    bits = tuple(tags.get(TiffImagePlugin.BITSPERSAMPLE, ()))
    if image.mode == "F":
        raise RejectedImage("floating-point samples: their range is not known")
    if _SIGNED in tuple(tags.get(TiffImagePlugin.SAMPLEFORMAT, ())):
        raise RejectedImage("signed samples: their range is not known")
    if max(bits, default=0) > 16:
        raise RejectedImage(f"samples of {max(bits)} bits: their range is not known")
    if 16 in bits and len(bits) > 1 and tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2:
        raise RejectedImage("16-bit samples in separate planes: save it with interleaved colours, or as PNG")
    if image.mode == "I" or image.mode.startswith("I;16"):
        inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return Depth("L", 4095 if bits == (12,) else white, inverted)
    layout, sixteen, order = rawmode.partition(";16")
    return Depth(layout, white) if sixteen and layout in _COLOURS and order in _BYTE_ORDERS else None


def low_bytes(image: Image.Image, rawmode: str) -> Image.Image | None:
    """The low bytes of 16-bit colour, of which Pillow keeps the high ones; None for gray, which it keeps whole.

    The file is decoded once more as if its bytes were in the other order.
    """
    layout, _, order = rawmode.partition(";16")
    if layout not in _COLOURS:
        return None
    twin = Image.open(
        image.filename or image.fp,  # type: ignore[attr-defined]
        formats=[str(image.format)],
    )
    if layout == "LA":  # As 8-bit "RGBA", a pixel is the two bytes of its gray and the two of its alpha.
        _read_as(twin, "RGBA")
        twin.load()
        _, gray, _, alpha = twin.split()
        return Image.merge("RGBA", (gray, gray, gray, alpha))
    straight = "RGBA" if layout == "RGBa" else layout
    _read_as(image, f"{straight};16{order}")
    _read_as(twin, f"{straight};16{_BYTE_ORDERS[order]}")
    twin.load()
    return twin


def _read_as(image: Image.Image, rawmode: str) -> None:
    """Let the samples of an opened file be unpacked in another way."""

    def changed(arguments: object) -> object:
        return (rawmode, *arguments[1:]) if isinstance(arguments, tuple) else rawmode

    image.tile = [tile._replace(args=changed(tile.args)) for tile in image.tile]  # type: ignore[attr-defined]


def _samples(high: Image.Image, low: Image.Image | None) -> npt.NDArray[np.uint16]:
    """uint16 [H, W] or [H, W, C]."""
    found = np.asarray(high)
    if low is not None:
        return np.asarray(found.astype(np.uint16) << 8 | np.asarray(low), np.uint16)
    least, most = int(found.min()), int(found.max())
    if least < 0 or most > WHITE_LEVEL:
        raise RejectedImage(f"samples beyond 16 bits: {least} to {most}")
    return found.astype(np.uint16)


@lru_cache(maxsize=4)
def _table(white: int) -> npt.NDArray[np.uint8]:
    """From a 16-bit sample to 8 bits, rounded; whatever is above white is white."""
    samples = np.arange(WHITE_LEVEL + 1)
    return np.minimum((samples * 255 * 2 + white) // (2 * white), 255).astype(np.uint8)
