"""Images inside a zip archive, read in memory one by one; member names are labels, never paths."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from PIL import Image

from diffkit.datasets.imagefile import MAX_BYTES, Refused, RejectedImage, is_image_name, open_image, rejecting
from diffkit.datasets.sorting import HEAD_BYTES, Entry, File, Found, hidden_part, sort_out
from diffkit.errors import DiffkitError, ExitCode

_LARGE = 2**24
_UTF8 = 0x800
_BYTES_PER_PIXEL = 8
_LOCAL_HEADER = struct.Struct("<4s22xHH")


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


def members(path: Path, generated: bool = False) -> Found:
    """The images of the zip archive at `path`; `generated` as in `sort_out`. Raises DiffkitError if it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise DiffkitError(
            f"{path} is not a readable zip archive: {error}", "Download or pack it again.", code=ExitCode.DATA
        ) from error
    found = Found()
    files: list[File] = []
    with archive:
        for name, info in _named(archive, found).items():
            reason = _refusal(info)
            if hidden := "" if reason else hidden_part(name):
                found.system[hidden] += 1
            elif reason and is_image_name(name):
                found.entries.append(Entry(name, Refused(reason)))
            elif reason:
                found.skip(name, reason)
            else:
                files.append(File(name, Member.of(path, info), partial(_head, archive, info)))
        sort_out(files, found, generated)
    return found


def _named(archive: zipfile.ZipFile, found: Found) -> dict[str, zipfile.ZipInfo]:
    """The files by the names that their packer meant; of two of one name the last, as unzip has it."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = _name(info)
        if info.is_dir() or name.endswith("/"):
            continue
        if name in infos:
            found.skip(name, "another member of the archive has the same name and comes later")
        infos[name] = info
    return infos


def _name(info: zipfile.ZipInfo) -> str:
    """Windows may write backslashes; macOS writes UTF-8 without the flag that says so."""
    name = info.filename
    if not info.flag_bits & _UTF8 and not name.isascii():
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


def _head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The first bytes of a member; none where it cannot be read."""
    try:
        with archive.open(info) as stream:
            return stream.read(HEAD_BYTES)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, zlib.error):
        return b""


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
