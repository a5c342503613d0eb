"""Images as a row stores them, decoded only when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Stored:
    """An image inside a row or an archive; calling it opens it. Can be pickled and sent to a worker."""

    data: bytes | None = field(repr=False)
    path: str | None

    def __call__(self) -> Image.Image:
        """The Pillow image. Raises ValueError if the row is empty, Pillow's own errors if it is damaged."""
        if self.data is not None:
            return Image.open(BytesIO(self.data))
        if self.path is None:
            raise ValueError("the row holds no image")
        from datasets import Image as Feature

        image: Image.Image = Feature().decode_example({"path": self.path, "bytes": None})
        return image


def undecoded(value: Any) -> Path | Stored:
    """A row's image: the path of a local file, or something that opens it when called."""
    if isinstance(value, bytes):
        return Stored(value, None)
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (None, value)
    if data is None and path and Path(path).is_file():
        return Path(path)
    return Stored(data, path)
