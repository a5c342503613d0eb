"""Checks of dataset sources."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.interfaces import Example
from diffkit.testing.signature import Expect, Options, check_signature, expectations

if TYPE_CHECKING:
    from torch import Tensor

    Sampler = Callable[..., Iterator[Tensor]]


def check_dataset(function: Callable[..., Iterator[Example]], path: str | Path, /, **options: Any) -> None:
    """A dataset source `(path, *, options) -> Iterator[Example]`, on a small data set of yours at `path`.

    At least one Example; the same list twice; ids all different (or None); images that are Pillow images,
    uint8 arrays, paths of existing files or functions that return a Pillow image; labels that are strings or
    None. Every image is looked at, so keep the data set small and free of damaged files.
    """
    expect = expectations(function)
    check_signature(expect, function, 1, options)
    first = [_fingerprint(expect, example) for example in _examples(expect, function, path, options)]
    expect(bool(first), "at least one Example", "none")
    ids = [record[0] for record in first if record[0] is not None]
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    expect(not repeated, "an id of its own for each Example", f"{repeated[:3]} more than once")
    second = [_fingerprint(expect, example) for example in _examples(expect, function, path, options)]
    expect(len(first) == len(second), f"{len(first)} examples again at the second call", len(second))
    for position, (one, other) in enumerate(zip(first, second, strict=True)):
        expect(one == other, f"example {position} to be the same at every call: {one}", other)


# What every kind shares: messages and signatures.


def _examples(
    expect: Expect, function: Callable[..., Iterator[Example]], path: str | Path, options: Options
) -> Iterator[Example]:
    """What the source yields, each one an Example with an id and a label of the right type."""
    found = function(str(path), **options)
    expect(isinstance(found, Iterator), "an iterator (a generator function)", type(found).__name__)
    for example in found:
        expect(isinstance(example, Example), "diffkit.interfaces.Example", type(example).__name__)
        for name, value in (("id", example.id), ("label", example.label)):
            expect(value is None or isinstance(value, str), f"a string or None as {name}", repr(value))
        expect(example.part in (None, "train", "holdout"), "train, holdout or None as part", repr(example.part))
        yield example


def _fingerprint(expect: Expect, example: Example) -> tuple[str | None, str | None, str, str | None]:
    """What must be the same at every call: id, label, and a word for each image."""
    paired = None if example.input is None else _image_word(expect, example.input)
    return (example.id, example.label, _image_word(expect, example.image), paired)


def _image_word(expect: Expect, image: Any) -> str:
    """A short description that changes when the image does."""
    import numpy as np
    from PIL import Image

    if isinstance(image, Path):
        expect(image.is_file(), "the path of an existing file", image)
        return f"file {image}"
    if callable(image) and not isinstance(image, Image.Image):
        image = image()
        expect(isinstance(image, Image.Image), "a function that returns a Pillow image", type(image).__name__)
    if isinstance(image, np.ndarray):
        shape = image.shape
        expect(image.dtype == np.uint8, "an image array in uint8", image.dtype)
        right = image.ndim == 2 or (image.ndim == 3 and shape[2] in (1, 3))
        expect(right and image.size > 0, "an image array [H, W], [H, W, 1] or [H, W, 3]", shape)
        return f"array {shape} {_digest(image.tobytes())}"
    kinds = "a Pillow image, a uint8 array, a Path or a function returning a Pillow image"
    expect(isinstance(image, Image.Image), kinds, type(image).__name__)
    return f"image {image.mode} {image.size} {_digest(image.tobytes())}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
