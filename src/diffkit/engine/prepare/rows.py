"""From examples to rows of pixels, decoded in threads, in the order of the examples."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from diffkit.datasets.imagefile import RejectedImage, is_gray, open_image, printable, rejecting
from diffkit.engine.fitting import fit
from diffkit.engine.prepare.options import PrepareOptions
from diffkit.engine.store import Pixels
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

_AUTO_LOOK = 64
_SHAPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Row:
    """What a worker makes of one example: pixels, or the reason why not; `input`: those of the paired image."""

    id: str
    path: str
    label: str | None
    attributes: Mapping[str, float]
    reason: str = ""
    pixels: Pixels | None = None
    width: int = 0
    height: int = 0
    sha256: str = ""
    input: Pixels | None = None
    part: str | None = None


class Channels(NamedTuple):
    """Of the images and of the paired inputs (0 = there are none)."""

    image: int
    input: int


def channels_of(examples: Iterable[Example], options: PrepareOptions) -> tuple[Iterable[Example], Channels]:
    """The numbers of channels, and the examples with those looked at put back in front."""
    source = iter(examples)
    first = list(islice(source, _AUTO_LOOK))
    inputs = [example.input for example in first if example.input is not None]
    found = Channels(
        options.channels or _channels([example.image for example in first]),
        (options.channels or _channels(inputs)) if inputs else 0,
    )
    return chain(first, source), found


def _channels(images: Sequence[ImageLike]) -> int:
    """1 if all those that can be read are gray."""
    known = [gray for gray in map(_looks_gray, images) if gray is not None]
    return 1 if known and all(known) else 3


def _looks_gray(image: ImageLike) -> bool | None:
    """From the header alone; None where there is no usable image."""
    try:
        with rejecting(), _opened(image) as opened:
            return is_gray(opened)
    except RejectedImage:
        return None


def decoded(examples: Iterable[Example], options: PrepareOptions, channels: Channels) -> Iterator[Row]:
    """Rows in the order of the examples; a bounded number of them is under way at any time."""
    workers = options.workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="diffkit-prepare")
    under_way: deque[Future[Row]] = deque()
    try:
        for index, example in enumerate(examples):
            under_way.append(pool.submit(_decode, index, example, options, channels))
            if len(under_way) > 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(index: int, example: Example, options: PrepareOptions, channels: Channels) -> Row:
    """In a worker: one example to its pixels."""
    identity = str(index) if example.id is None else example.id
    path = printable(str(example.image)) if isinstance(example.image, Path) else identity
    plain = {name: float(value) for name, value in (example.attributes or {}).items() if not math.isnan(value)}
    try:
        pixels, width, height = _pixels(example.image, options, channels.image, identity)
        paired = _pair(example.input, options, channels.input, identity, width / height) if channels.input else None
    except RejectedImage as error:
        return Row(identity, path, example.label, plain, error.reason)
    digest = sha256(pixels.tobytes()).hexdigest()
    return Row(identity, path, example.label, plain, "", pixels, width, height, digest, paired, example.part)


def _pixels(image: ImageLike, options: PrepareOptions, channels: int, identity: str) -> tuple[Pixels, int, int]:
    """One image at the size wanted, and the width and height it had."""
    with rejecting(), _opened(image) as opened:
        if min(opened.size) < options.min_side:
            raise RejectedImage(f"too small: {opened.size[0]}x{opened.size[1]}")
        if options.channels == 0 and channels == 1 and not is_gray(opened):
            raise _found_colour(identity)
        return fit(opened, options.height, options.width, channels, options.crop, options.background, identity)


def _pair(image: ImageLike | None, options: PrepareOptions, channels: int, identity: str, shape: float) -> Pixels:
    """The paired input, cropped as its image is; so it has to be of the same shape."""
    if image is None:
        raise RejectedImage("it has no pair")
    try:
        pixels, width, height = _pixels(image, options, channels, identity)
    except RejectedImage as error:
        raise RejectedImage(f"its pair cannot be used: {error.reason}") from error
    if abs(width / height / shape - 1) > _SHAPE_TOLERANCE:
        raise RejectedImage(f"its pair is of another shape: {width}x{height}")
    return pixels


def _opened(image: ImageLike) -> AbstractContextManager[Image.Image]:
    """Whatever a source gave, as a Pillow image; `with` closes it if it was opened here."""
    if isinstance(image, Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return nullcontext(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (1,), (3,)) or image.size == 0:
            raise RejectedImage(f"not an image: an array {image.dtype} {image.shape}")
        return nullcontext(Image.fromarray(image if image.shape[2:] != (1,) else image[..., 0]))
    return image()


def _found_colour(identity: str) -> DiffkitError:
    return DiffkitError(
        f"The first {_AUTO_LOOK} images are gray, but {identity} is not.",
        "Say which it shall be: --color color or --color gray.",
        code=ExitCode.DATA,
    )
