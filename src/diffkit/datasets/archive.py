"""Images inside a zip archive, read in memory one by one; member names are labels, never paths."""

from __future__ import annotations

import io
import threading
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from diffkit.datasets.imagefile import MAX_BYTES, Refused, RejectedImage, is_image_name, open_image, rejecting
from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

_LARGE = 2**24


class Entry(NamedTuple):
    """What has an image's extension: its relative POSIX name, and the image (None = the file there)."""

    name: str
    image: ImageLike | None = None


@dataclass
class Found:
    """What a folder or an archive holds: images, the other extensions seen, a folder around everything."""

    entries: list[Entry] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    wrapper: str = ""

    def add(self, name: str, image: ImageLike | None = None) -> None:
        """Sort a file by its extension."""
        if is_image_name(name):
            self.entries.append(Entry(name, image))
        else:
            self.others[Path(name).suffix.lower() or "no extension"] += 1


@dataclass(frozen=True)
class _Member:
    """A lazy image: decoded when called, in whatever thread."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo
    lock: threading.Lock

    def __call__(self) -> Image.Image:
        with rejecting():
            try:
                data = self._read()
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
                raise RejectedImage(f"damaged archive member: {error}") from error
        return open_image(io.BytesIO(data))

    def _read(self) -> bytes:
        # zipfile counts its open members without a lock of its own.
        with self.lock, self.archive.open(self.info) as stream:
            if self.info.file_size > _LARGE:
                open_image(stream)  # the header first: a zip bomb must not be unpacked to be refused
                stream.seek(0)
            return stream.read()


def members(path: Path) -> Found:
    """The images of the zip archive at `path`. Raises DiffkitError for a damaged archive."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DiffkitError(
            f"{path} is not a readable zip archive: {error}", "Download or pack it again.", code=ExitCode.DATA
        ) from error
    found, lock = Found(), threading.Lock()
    for name, info in {info.filename: info for info in archive.infolist()}.items():
        reason = _refusal(info)
        if not info.is_dir() and (reason or not is_hidden(name)):
            found.add(name, Refused(reason) if reason else _Member(archive, info, lock))
    tops = {entry.name.partition("/")[0] for entry in found.entries}
    if len(tops) == 1 and all("/" in entry.name for entry in found.entries):
        found.wrapper = tops.pop() + "/"
    return found


def is_hidden(name: str) -> bool:
    """Whether any part of a relative POSIX name is hidden, or one of macOS' shadow folders."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _refusal(info: zipfile.ZipInfo) -> str:
    """Why a member is not even opened; empty if it may be."""
    parts = info.filename.replace("\\", "/").split("/")
    if ".." in parts or not parts[0] or parts[0].endswith(":"):
        return "unsafe name: it points outside the archive"
    if info.flag_bits & 1:
        return "encrypted archive member"
    if info.file_size > MAX_BYTES:
        return f"file too large: {info.file_size / 2**30:.1f} GiB"
    return ""
