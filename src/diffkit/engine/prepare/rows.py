"""From examples to rows of pixels, in the order of the examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffkit.datasets.imagefile import RejectedImage, printable
from diffkit.engine.decoders import Decoders
from diffkit.engine.decoding import Decoded, Frame
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
    """What becomes of one example: pixels, or the reason why not; `input`: those of the paired image.

    `peak`: the largest 16-bit sample of the image, 0 if it has 8 bits.
    """

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
    peak: int = 0


class Channels(NamedTuple):
    """Of the images and of the paired inputs (0 = there are none)."""

    image: int
    input: int


def channels_of(
    examples: Iterable[Example], options: PrepareOptions, decoders: Decoders
) -> tuple[Iterable[Example], Channels]:
    """The numbers of channels, and the examples with those looked at put back in front."""
    source = iter(examples)
    first = list(islice(source, _AUTO_LOOK))
    inputs = [example.input for example in first if example.input is not None]
    found = Channels(
        options.channels or _channels([example.image for example in first], decoders),
        (options.channels or _channels(inputs, decoders)) if inputs else 0,
    )
    return chain(first, source), found


def _channels(images: Sequence[ImageLike], decoders: Decoders) -> int:
    """1 if all those that can be read are gray."""
    found = decoders.ordered(partial(_looks_gray, decoders), images)
    known = [gray for gray in found if gray is not None]
    return 1 if known and all(known) else 3


def _looks_gray(decoders: Decoders, image: ImageLike) -> bool | None:
    """None where there is no usable image."""
    try:
        return decoders.looks_gray(image)
    except RejectedImage:
        return None


def rows(examples: Iterable[Example], options: PrepareOptions, channels: Channels, decoders: Decoders) -> Iterator[Row]:
    """Rows in the order of the examples."""

    def row(numbered: tuple[int, Example]) -> Row:
        return _row(*numbered, options, channels, decoders)

    return decoders.ordered(row, enumerate(examples))


def _row(index: int, example: Example, options: PrepareOptions, channels: Channels, decoders: Decoders) -> Row:
    """In a thread: one example to its pixels."""
    identity = str(index) if example.id is None else example.id
    path = printable(str(example.image)) if isinstance(example.image, Path) else identity
    plain = {name: float(value) for name, value in (example.attributes or {}).items() if not math.isnan(value)}
    try:
        found = _decoded(example.image, options, channels.image, identity, decoders)
        paired = _pair(example.input, options, channels.input, identity, found, decoders) if channels.input else None
    except RejectedImage as error:
        return Row(identity, path, example.label, plain, error.reason)
    digest = sha256(found.pixels.data).hexdigest()
    size = found.width, found.height
    return Row(identity, path, example.label, plain, "", found.pixels, *size, digest, paired, found.peak)


def _decoded(image: ImageLike, options: PrepareOptions, channels: int, identity: str, decoders: Decoders) -> Decoded:
    """One image at the size of the data set."""
    frame = Frame(
        channels,
        options.height,
        options.width,
        options.crop,
        options.background,
        key=identity,
        min_side=options.min_side,
        white_level=options.white_level,
    )
    found = decoders.decode(image, frame)
    if options.channels == 0 and channels == 1 and not found.gray:
        raise _found_colour(identity)
    return found


def _pair(
    image: ImageLike | None, options: PrepareOptions, channels: int, identity: str, whole: Decoded, decoders: Decoders
) -> Pixels:
    """The paired input, cropped as its image is; so it has to be of the same shape."""
    if image is None:
        raise RejectedImage("it has no pair")
    try:
        found = _decoded(image, options, channels, identity, decoders)
    except RejectedImage as error:
        raise RejectedImage(f"its pair cannot be used: {error.reason}") from error
    if abs(found.width / found.height / (whole.width / whole.height) - 1) > _SHAPE_TOLERANCE:
        raise RejectedImage(f"its pair is of another shape: {found.width}x{found.height}")
    return found.pixels


def _found_colour(identity: str) -> DiffkitError:
    return DiffkitError(
        f"The first {_AUTO_LOOK} images are gray, but {identity} is not.",
        "Say which it shall be: --color color or --color gray.",
        code=ExitCode.DATA,
    )
