"""PNG files and grids of images."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkit import durable

GAP = 2
LEAST_SIDE = 64


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 1] or [H, W, 3] -> PNG bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format="PNG")
    return file.getvalue()


def save_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write one image; the file appears whole."""
    durable.write_bytes(path, png(pixels))


def grid(images: npt.NDArray[np.uint8], columns: int | None = None) -> npt.NDArray[np.uint8]:
    """uint8 [N, H, W, C] -> one picture [H', W', C], rows filled in order; small images are enlarged, unsmoothed."""
    factor = max(1, LEAST_SIDE // max(images.shape[1:3]))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), 255, np.uint8)
    for number, image in enumerate(images):
        y = GAP + number // columns * (height + GAP)
        x = GAP + number % columns * (width + GAP)
        sheet[y : y + height, x : x + width] = image
    return sheet


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two images, in dB; 99 for equal ones."""
    error = float(np.square(one.astype(np.float64) - other).mean())
    return 99.0 if error == 0 else min(99.0, 10 * math.log10(255**2 / error))
