"""One image file, opened with suspicion: only its header is read. `diffkit.datasets.pixels` decodes it.

Everything that goes wrong becomes a `RejectedImage` with a short reason of the form `kind: detail`.
"""

from __future__ import annotations

import logging
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TypeAlias

# Imported here, since Pillow's own lazy loading of format plugins is not safe in several threads at once.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from diffkit.errors import DiffkitError

Color: TypeAlias = tuple[int, int, int]

EXTENSIONS = frozenset([".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"])
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30
WHITE: Color = (255, 255, 255)

_FOREIGN = {
    b"ftypheic": "a HEIC photo",
    b"ftypheix": "a HEIC photo",
    b"ftypmif1": "a HEIF photo",
    b"ftypavif": "an AVIF image",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"<svg": "an SVG drawing",
    b"%pdf": "a PDF document",
    b"%!ps": "a PostScript document",
    b"8bps": "a Photoshop document",
}


class RejectedImage(Exception):
    """An image that cannot be used; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Refused:
    """Stands where a lazy image would, for something that a source found but will not open."""

    reason: str

    def __call__(self) -> Image.Image:
        raise RejectedImage(self.reason)


def is_image_name(name: str) -> bool:
    """Whether the extension of a file name (in any case) says image."""
    return PurePosixPath(name).suffix.lower() in EXTENSIONS


def printable(name: str) -> str:
    """A file name as text that any terminal and any JSON file can hold; different names stay different.

    Backslashes, control characters and bytes that are not UTF-8 are written as escapes.
    """
    plain = (c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in name)
    return "".join(plain)


def open_image(source: Path | IO[bytes], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image by its content; only the header is read, pixels are decoded later.

    Accepts JPEG, PNG, WEBP, BMP, GIF and TIFF of up to `max_pixels` pixels. Special files (FIFO, socket,
    device) are never opened. The caller closes the result (`with`). Raises `RejectedImage`.
    """
    with rejecting():
        if isinstance(source, Path):
            _check_file(source)
        try:
            image = Image.open(source, formats=FORMATS)
        except (UnidentifiedImageError, OSError) as error:
            raise RejectedImage(_unidentified(source, error)) from error
        width, height = image.size
        if width * height > max_pixels or width * height == 0:
            image.close()
            reason = f"too many pixels: {width}x{height}, the most is {max_pixels / 1e6:.0f} million"
            raise RejectedImage(reason if width * height else "no pixels")
        return image


def _check_file(path: Path) -> None:
    """Only regular files of a sane size are ever opened: a FIFO would block for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise RejectedImage("not a regular file")
    if status.st_size == 0:
        raise RejectedImage("empty file")
    if status.st_size > MAX_BYTES:
        raise RejectedImage(f"file too large: {status.st_size / 2**30:.1f} GiB")


def _unidentified(source: Path | IO[bytes], error: Exception) -> str:
    """Why Pillow refused the header, looked up in the first bytes where that is friendlier."""
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {error.strerror}"
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(256)
    else:
        source.seek(0)
        head = source.read(256)
    if not head:
        return "empty file"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, name in _FOREIGN.items():
        if start.startswith(signature) or start[4:].startswith(signature):
            return f"not a supported format: {name}"
    if head.startswith((b"II*\0", b"MM\0*")):
        return "not a supported kind of TIFF, or damaged at its start"
    if not isinstance(error, UnidentifiedImageError):
        return f"damaged: {one_line(error)}"
    if start.isascii() and not any(byte < 9 or byte == 127 for byte in start):
        return "not a supported format: text"
    return "not a supported format, or damaged at its start"


def one_line(error: BaseException) -> str:
    """An exception in one printable line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:120]


@contextmanager
def rejecting() -> Iterator[None]:
    """Inside, every failure is a `RejectedImage`, and Pillow's remarks stay unsaid."""
    try:
        with _quiet_pillow:
            yield
    except (RejectedImage, DiffkitError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RejectedImage(f"too many pixels: the most is {MAX_PIXELS / 1e6:.0f} million") from error
    except MemoryError as error:
        raise RejectedImage("not enough memory to decode it") from error
    except OSError as error:
        detail = f"cannot be read: {error.strerror}" if error.errno else f"damaged: {one_line(error)}"
        raise RejectedImage(detail) from error
    except Exception as error:
        raise RejectedImage(f"damaged: {one_line(error)}") from error


class _QuietPillow:
    """Pillow's limits and warnings while any thread decodes: set by the first in, restored by the last out.

    `warnings.catch_warnings` alone is not safe in threads. Bomb warnings become errors; remarks on sloppy
    metadata are dropped.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()
        self._limit: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._caught = warnings.catch_warnings()
            self._caught.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.__exit__(None, None, None)
                Image.MAX_IMAGE_PIXELS = self._limit


logging.getLogger("PIL").addHandler(logging.NullHandler())  # or it writes to standard error by itself
_quiet_pillow = _QuietPillow()
