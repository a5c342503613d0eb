"""The images of a folder or archive that a user brings: found as `diffkit prepare` finds them, and all tried once."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffkit.datasets.folder import folder
from diffkit.datasets.imagefile import RejectedImage, is_image_name
from diffkit.engine.decoders import Decoders
from diffkit.engine.decoding import Decoded, Frame
from diffkit.engine.prepare.options import LARGEST
from diffkit.engine.store import Pixels
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example, account_of

KEPT = 2**30


@dataclass(frozen=True)
class Readable:
    """Images that can be decoded, and what was found when they were.

    `sizes`: width and height of each upright original. `gray`: all say that they have no colour. `read(indices)`
    decodes; `rejected`: for each file that cannot be used, its name and the reason; `passed_over`: the same for what
    looks like an image and was not tried, such as other formats.
    """

    examples: tuple[Example, ...]
    sizes: tuple[tuple[int, int], ...]
    gray: bool
    read: Callable[[Sequence[int]], list[Pixels]]
    rejected: tuple[tuple[str, str], ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def names(self) -> list[str]:
        """Relative names, as they are shown."""
        return [str(example.id) for example in self.examples]

    def skipped(self, path: Path) -> tuple[str, ...]:
        """For the user, which files are left out; empty if none is."""
        notes = []
        for left_out, what in ((self.rejected, "cannot be used and "), (self.passed_over, "")):
            count = len(left_out)
            verb = "is" if count == 1 else "are"
            more = f", and {count - 3} more" if count > 3 else ""
            if left_out:
                notes.append(
                    f"{count} file{'s' if count > 1 else ''} in {path} {what}{verb} skipped: {_listed(left_out)}{more}."
                )
        return tuple(notes)


def examples_at(path: Path) -> Iterable[Example]:
    """The images of a folder or zip archive, or the one image file. Raises DiffkitError if there is none."""
    if path.is_file() and (is_image_name(path.name) or not zipfile.is_zipfile(path)):
        return [Example(path, id=path.name)]
    return folder(str(path))


def readable(given: Iterable[Example], frame: Frame, path: Path, workers: int = 0) -> Readable:
    """Decode each once to know which can be; up to `KEPT` bytes of pixels are kept, the others decoded when read.

    Raises DiffkitError if none can be, or if `path` is one file.
    """
    examples = list(given)
    decoders = Decoders(workers, LARGEST * LARGEST)
    kept: dict[int, Pixels] = {}
    usable: list[Example] = []
    sizes: list[tuple[int, int]] = []
    rejected: list[tuple[str, str]] = []
    gray, room = True, KEPT
    answers = decoders.decode_all((example.image, _framed(frame, example)) for example in examples)
    for example, found in zip(examples, answers, strict=True):
        if isinstance(found, RejectedImage):
            rejected.append((str(example.id), found.reason))
            continue
        assert isinstance(found, Decoded)
        room -= found.pixels.nbytes
        if room >= 0:
            kept[len(usable)] = found.pixels
        usable.append(example)
        sizes.append((found.width, found.height))
        gray = gray and found.gray
    if not usable:
        what = f"{path} cannot be used: {rejected[0][1]}." if path.is_file() and len(rejected) == 1 else ""
        what = what or f"No image in {path} can be used: {_listed(rejected)}."
        raise DiffkitError(what, "Save it anew, or give another.", code=ExitCode.DATA)

    def read(indices: Sequence[int]) -> list[Pixels]:
        missing = [index for index in indices if index not in kept]
        requests = ((usable[index].image, _framed(frame, usable[index])) for index in missing)
        decoded: dict[int, Pixels] = {}
        for index, found in zip(missing, decoders.decode_all(requests), strict=True):
            if isinstance(found, RejectedImage):
                raise DiffkitError(
                    f"{usable[index].id} in {path} could be read before, and cannot be any more: {found.reason}.",
                    "Leave the images as they are while they are in use.",
                    code=ExitCode.DATA,
                )
            assert isinstance(found, Decoded)
            decoded[index] = found.pixels
        return [kept[index] if index in kept else decoded[index] for index in indices]

    return Readable(tuple(usable), tuple(sizes), gray, read, tuple(rejected), tuple(account_of(given).skipped))


def _listed(rejected: Sequence[tuple[str, str]]) -> str:
    """The first three, with their reasons."""
    return "; ".join(f"{name} ({reason})" for name, reason in rejected[:3])


def _framed(frame: Frame, example: Example) -> Frame:
    return replace(frame, key=str(example.id))
