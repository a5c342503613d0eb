"""From examples to rows of pixels, in the order of the examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffkit.datasets.imagefile import RejectedImage, printable
from diffkit.engine.decoders import Decoders, Request
from diffkit.engine.decoding import Answer, Decoded, Frame
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

    `peak`: the largest 16-bit sample of the image, 0 if it has 8 bits. `several`: more frames or pages follow.
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
    part: str | None = None
    peak: int = 0
    several: bool = False


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
    """1 if all those that can be read say that they are gray."""
    known = [gray for gray in decoders.decode_all((image, None) for image in images) if isinstance(gray, bool)]
    return 1 if known and all(known) else 3


def rows(examples: Iterable[Example], options: PrepareOptions, channels: Channels, decoders: Decoders) -> Iterator[Row]:
    """Rows in the order of the examples."""
    ahead, behind = tee(enumerate(examples))
    answers = decoders.decode_all(request for each in ahead for request in _requests(*each, options, channels))
    for index, example in behind:
        image = next(answers)
        paired = next(answers) if channels.input and example.input is not None else None
        yield _row(_identity(index, example), example, image, paired, options, channels)


def _requests(index: int, example: Example, options: PrepareOptions, channels: Channels) -> Iterator[Request]:
    """The image of an example and its paired input, at the size of the data set."""
    frame = Frame(
        channels.image,
        options.height,
        options.width,
        options.crop,
        options.background,
        key=_identity(index, example),
        min_side=options.min_side,
        white_level=options.white_level,
    )
    yield example.image, frame
    if channels.input and example.input is not None:
        yield example.input, replace(frame, channels=channels.input)


def _identity(index: int, example: Example) -> str:
    return str(index) if example.id is None else example.id


def _row(
    identity: str,
    example: Example,
    image: Answer,
    paired: Answer | None,
    options: PrepareOptions,
    channels: Channels,
) -> Row:
    """What was decoded, or why it cannot be used."""
    path = printable(str(example.image)) if isinstance(example.image, Path) else identity
    plain = {name: float(value) for name, value in (example.attributes or {}).items() if not math.isnan(value)}
    try:
        found = _usable(image, options, channels.image, identity)
        beside = _pair(paired, options, channels.input, identity, found) if channels.input else None
    except RejectedImage as error:
        return Row(identity, path, example.label, plain, error.reason)
    return Row(
        identity,
        path,
        example.label,
        plain,
        pixels=found.pixels,
        width=found.width,
        height=found.height,
        sha256=found.sha256,
        input=beside,
        part=example.part,
        peak=found.peak,
        several=found.several,
    )


def _usable(answer: Answer, options: PrepareOptions, channels: int, identity: str) -> Decoded:
    """Raises RejectedImage, and DiffkitError for colour where gray was expected."""
    if isinstance(answer, RejectedImage):
        raise answer
    assert isinstance(answer, Decoded)
    if options.channels == 0 and channels == 1 and not answer.gray:
        raise _found_colour(identity)
    return answer


def _pair(answer: Answer | None, options: PrepareOptions, channels: int, identity: str, whole: Decoded) -> Pixels:
    """The paired input, cropped as its image is; so it has to be of the same shape."""
    if answer is None:
        raise RejectedImage("it has no pair")
    try:
        found = _usable(answer, options, channels, identity)
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
