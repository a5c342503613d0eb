"""Images inside a zip archive, read in memory one by one; member names are labels, never paths."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from PIL import Image

from diffkit.datasets.imagefile import MAX_BYTES, Refused, RejectedImage, is_image_name, open_image, rejecting
from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

_LARGE = 2**24
_BYTES_PER_PIXEL = 8
_LOCAL_HEADER = struct.Struct("<4s22xHH")


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
class Member:
    """An image inside a zip archive: decoded when called, in whatever thread or process."""

    archive: Path
    offset: int
    method: int
    packed: int
    size: int
    checksum: int

    @classmethod
    def of(cls, archive: Path, info: zipfile.ZipInfo) -> Member:
        """From the archive's table of contents."""
        return cls(archive, info.header_offset, info.compress_type, info.compress_size, info.file_size, info.CRC)

    def __call__(self) -> Image.Image:
        with rejecting():
            try:
                return open_image(io.BytesIO(self._read()))
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
                raise RejectedImage(f"damaged archive member: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {**vars(self), "archive": str(self.archive)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Member:
        """The inverse of `to_dict`."""
        return cls(**{**values, "archive": Path(values["archive"])})

    def _read(self) -> bytes:
        with self.archive.open("rb") as file:
            stream = self._unpacked(file)
            if self.size <= _LARGE:
                return stream.read()
            # The header first: a zip bomb must not be unpacked to be refused.
            width, height = open_image(stream).size
            if self.size > _LARGE + _BYTES_PER_PIXEL * width * height:
                raise RejectedImage(f"too large: {self.size / 2**20:.0f} MiB for {width}x{height} pixels")
            stream.seek(0)
            return stream.read()

    def _unpacked(self, file: BinaryIO) -> IO[bytes]:
        """The content as a stream that checks length and checksum; found without the table of contents."""
        file.seek(self.offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            raise zipfile.BadZipFile("truncated")
        signature, name, extra = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("no member where the archive's table says")
        file.seek(name + extra, io.SEEK_CUR)
        info = zipfile.ZipInfo()
        info.compress_type, info.compress_size = self.method, self.packed
        info.file_size, info.CRC = self.size, self.checksum
        return cast("IO[bytes]", zipfile.ZipExtFile(file, "r", info))


def members(path: Path) -> Found:
    """The images of the zip archive at `path`. Raises DiffkitError for a damaged archive."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DiffkitError(
            f"{path} is not a readable zip archive: {error}", "Download or pack it again.", code=ExitCode.DATA
        ) from error
    found = Found()
    for name, info in {info.filename: info for info in archive.infolist()}.items():
        reason = _refusal(info)
        if not info.is_dir() and (reason or not is_hidden(name)):
            found.add(name, Refused(reason) if reason else Member.of(path, info))
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
