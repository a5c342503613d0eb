"""Images of every mode, turned, and of any size."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.pictures import (
    SIDE,
    bounded,
    encoded,
    picture,
    png,
    prepare,
    stored,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@row(21, "modes: gray, 16 bits, palettes, transparency, CMYK, floating point")
def modes(bench: Bench) -> Iterator[Trial]:
    return bench.cases(
        bilevel, gray_alpha, palette, palette_transparency, color_alpha, cmyk, gray_16, gray_16_tiff, floats
    )


@row(22, "photos turned by EXIF, with invalid orientations, animated")
def orientations(bench: Bench) -> Iterator[Trial]:
    return bench.each(turned, [(value, suffix) for value in range(10) for suffix in ("jpg", "png", "tif", "webp")])


@row(23, "images of one pixel, one row, prime sizes")
def sizes(bench: Bench) -> Iterator[Trial]:
    shapes = [(1, 1), (1, 20_000), (20_000, 1), (12, 12), (13, 17), (11, 12), (12, 4001), (2, 3)]
    return bench.each(sized, [(*shape, crop) for shape in shapes for crop in ("center", "random", "pad")])


def _becomes(lab: Lab, room: Path, name: str, data: bytes, expected: npt.NDArray[Any] | None, within: int = 0) -> str:
    """A file is stored as these pixels; None: it is rejected."""
    import numpy as np

    (room / "in").mkdir()
    (room / "in" / name).write_bytes(data)
    (room / "in" / "sound.png").write_bytes(encoded(picture(), "png"))
    if problem := prepare(lab, room).unlike(0):
        return problem
    found = stored(room).get(name)
    if found is None or expected is None:
        return "" if found is expected else "was rejected" if found is None else "was stored"
    off = int(np.abs(found.astype(int) - expected.astype(int)).max())
    return f"off by {off}" if off > within else ""


def _gray() -> npt.NDArray[np.uint8]:
    import numpy as np

    return np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)


def _three(gray: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return gray[..., None].repeat(3, -1)


def bilevel(lab: Lab, room: Path) -> str:
    """One bit a pixel becomes 0 and 255."""
    from PIL import Image

    black = _gray() > 99
    return _becomes(lab, room, "a.png", encoded(Image.fromarray(black), "png"), _three(black * 255))


def gray_alpha(lab: Lab, room: Path) -> str:
    """Gray with transparency is laid over white."""
    from PIL import Image

    gray, alpha = _gray(), _gray()[::-1]
    image = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha.copy())])
    over = (gray * (alpha / 255) + 255 * (1 - alpha / 255)).round()
    return _becomes(lab, room, "a.png", encoded(image, "png"), _three(over), within=1)


def palette(lab: Lab, room: Path) -> str:
    """A palette becomes its colours."""
    import numpy as np

    image = picture().quantize(16)
    return _becomes(lab, room, "a.png", encoded(image, "png"), np.asarray(image.convert("RGB")))


def palette_transparency(lab: Lab, room: Path) -> str:
    """A transparent colour of a palette becomes white."""
    import numpy as np

    image = picture().quantize(16)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    return _becomes(lab, room, "a.png", encoded(image, "png", transparency=3), expected)


def color_alpha(lab: Lab, room: Path) -> str:
    """Colour with transparency is laid over white."""
    import numpy as np
    from PIL import Image

    image, alpha = picture(), _gray()
    expected = np.asarray(image) * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    image.putalpha(Image.fromarray(alpha))
    return _becomes(lab, room, "a.webp", encoded(image, "webp", lossless=True, exact=True), expected.round(), within=1)


def cmyk(lab: Lab, room: Path) -> str:
    """CMYK without a profile becomes (255 - ink) * (255 - black) / 255."""
    import numpy as np

    image = picture().convert("CMYK")
    ink = np.asarray(image).astype(float)
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    return _becomes(lab, room, "a.tif", encoded(image, "tif"), expected.round(), within=1)


def _sixteen() -> npt.NDArray[np.uint16]:
    import numpy as np

    samples: npt.NDArray[np.uint16] = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16)
    return samples.reshape(SIDE, SIDE)


def gray_16(lab: Lab, room: Path) -> str:
    """16-bit gray is divided by 257."""
    rows = b"".join(b"\0" + line.tobytes() for line in _sixteen().astype(">u2"))
    data = png(SIDE, SIDE, depth=16, color=0, rows=rows)
    return _becomes(lab, room, "a.png", data, _three((_sixteen() / 257).round()))


def gray_16_tiff(lab: Lab, room: Path) -> str:
    """16-bit gray in a TIFF is divided by 257."""
    from PIL import Image

    data = encoded(Image.fromarray(_sixteen()), "tif")
    return _becomes(lab, room, "a.tif", data, _three((_sixteen() / 257).round()))


def floats(lab: Lab, room: Path) -> str:
    """Floating-point samples, whose range is not known, are rejected."""
    from PIL import Image

    return _becomes(lab, room, "a.tif", encoded(Image.fromarray(_sixteen().astype("float32")), "tif"), None)


def turned(lab: Lab, value: int, suffix: str) -> Trial:
    """An orientation is followed; one that does not exist is ignored."""
    import numpy as np
    from PIL import Image, ImageOps

    room, image, exif = lab.room(), picture(), Image.Exif()
    exif[0x0112] = value
    plain: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "tif": {"compression": None}}
    data = encoded(image, suffix, exif=exif, **plain.get(suffix, {}))
    with Image.open(io.BytesIO(data)) as again:
        expected = np.asarray(ImageOps.exif_transpose(again).convert("RGB"))
    problem = _becomes(lab, room, f"a.{suffix}", data, expected)
    Lab.clear(room)
    return Trial(f"orientation {value} of a .{suffix}", problem)


def sized(lab: Lab, width: int, height: int, crop: str) -> Trial:
    """A size is made the right one, or rejected with a reason; a flat colour stays what it was."""
    import numpy as np
    from PIL import Image

    room = lab.room()
    (room / "in").mkdir()
    Image.new("RGB", (width, height), (200, 100, 50)).save(room / "in" / "a.png")
    outcome = prepare(lab, room, "--crop", crop, "--background", "#c86432", side=12)
    found = stored(room).get("a.png")
    problem = outcome.unlike({0, 3}) or bounded(outcome)
    if found is not None and not problem and not np.array_equal(found, np.full((12, 12, 3), (200, 100, 50), np.uint8)):
        problem = "the colour has changed"
    Lab.clear(room)
    return Trial(f"{width}x{height}, {crop}", problem)
