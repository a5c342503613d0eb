"""Images that the rows of the self-test make, and what is prepared of them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.selftest.lab import Lab, Outcome

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL.Image import Image

FORMATS: dict[str, dict[str, Any]] = {
    "png": {},
    "jpg": {"quality": 90},
    "webp": {},
    "bmp": {},
    "gif": {},
    "tif": {"compression": "tiff_lzw"},
}
BATCH, SIDE = 20, 24

LONGEST, MOST = 30.0, 500 * 2**20


def picture(side: int = SIDE, seed: int = 0) -> Image:
    """Colours that change smoothly, with some noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, side)
    pixels = np.stack(
        [ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None], 0.5 * (ramp + ramp[:, None])], -1
    )
    return Image.fromarray((pixels + random.uniform(0, 55, pixels.shape)).astype("uint8"))


def encoded(image: Image, suffix: str, **options: Any) -> bytes:
    """As the content of a file."""
    file, names = io.BytesIO(), {"jpg": "JPEG", "tif": "TIFF"}
    image.save(file, names.get(suffix, suffix.upper()), **{**FORMATS[suffix], **options})
    return file.getvalue()


def prepare(lab: Lab, room: Path, *options: object, source: str = "in", side: int = SIDE) -> Outcome:
    """Prepare the images in `room/in` as the set `room/out`, whatever is rejected."""
    words = ("-o", "out", "--size", side, "--holdout", "0", "--max-rejected", "100%", "--color", "color")
    return lab.diffkit("prepare", source, *words, *options, here=room)


def stored(room: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """The stored images, by the name of their file."""
    import numpy as np

    if not (room / "out" / "images-00000.npy").exists():
        return {}
    records = map(json.loads, (room / "out" / "examples.jsonl").read_text().split("\n")[:-1])
    return dict(zip((record["id"] for record in records), np.load(room / "out" / "images-00000.npy"), strict=True))


def bounded(outcome: Outcome) -> str:
    """Whether a command took too long, or too much memory."""
    if outcome.seconds > LONGEST:
        return f"took {outcome.seconds:.0f} s"
    return f"took {outcome.memory / 2**20:.0f} MiB" if outcome.memory > MOST else ""


def png(width: int, height: int, *more: bytes, depth: int = 8, color: int = 2, rows: bytes | None = None) -> bytes:
    """A PNG file, of black rows if none are given, with `more` chunks in front of them."""
    if rows is None:
        line = zlib.compressobj(9)
        rows = b"".join(line.compress(bytes(1 + 3 * width)) for _ in range(height)) + line.flush()
    else:
        rows = zlib.compress(rows)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A piece of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
