"""The demo's images: scikit-learn's handwritten digits, which need no download, written as PNG files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit import durable
from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image

DIGITS = tuple("0123456789")


def write_demo_images(folder: Path, *, size: int = 16) -> dict[str, int]:
    """Write 1,797 gray images of `size` x `size` pixels as `folder/<digit>/<index>.png`; images per class.

    The digits (8 x 8 pixels, from scikit-learn) are enlarged to three quarters of `size` with a black margin
    around them. `folder` appears whole or not at all. Raises DiffkitError if it is not empty, if `size` is
    below 8, or if scikit-learn is not installed.
    """
    if size < 8:
        raise DiffkitError(f"A demo image of {size} pixels is too small for a digit.", "The least is 8.")
    if not durable.vacant(folder):
        raise DiffkitError(f"{folder} exists and is not an empty folder.", "Give the name of a new folder.")
    pixels, labels = _digits()
    counts = Counter(DIGITS[label] for label in labels)
    with durable.new_folder(folder) as building:
        for name in DIGITS:
            (building / name).mkdir()
        for index, (digit, label) in enumerate(zip(pixels, labels, strict=True)):
            _framed(digit, size).save(building / DIGITS[label] / f"{index:04d}.png")
        if folder.exists():
            folder.rmdir()
    return {name: counts[name] for name in DIGITS}


def _digits() -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Pixels [1797, 8, 8] from 0 to 255 (scikit-learn's go from 0 to 16), and the digit that each shows."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DiffkitError(
            "The demo's images come from scikit-learn, which is not installed.", "pip install 'diffkit[demo]'"
        ) from error
    found = load_digits()
    return (found.images * (255 / 16)).round().astype("uint8"), found.target.tolist()


def _framed(digit: npt.NDArray[np.uint8], size: int) -> Image.Image:
    """The digit, enlarged smoothly, in the middle of a black square, so that none touches the next in a grid."""
    from PIL import Image

    inner = round(size * 0.75)
    enlarged = Image.fromarray(digit).resize((inner, inner), Image.Resampling.BICUBIC)
    square = Image.new("L", (size, size))
    square.paste(enlarged, ((size - inner) // 2, (size - inner) // 2))
    return square
