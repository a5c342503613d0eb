"""Images: damaged, enormous, in every mode, turned, of any size."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.selftest import damage
from diffkit.selftest.bench import Bench, Trial, row
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


@row(19, "damaged images: what Pillow refuses is not stored, and what it reads is stored as it reads it", full=1800)
def damaged(bench: Bench) -> Iterator[Trial]:
    return bench.each(prepared_damaged, ((suffix, seed) for seed in range(1000) for suffix in FORMATS))


@row(20, "bombs: small files that unpack to much")
def bombs(bench: Bench) -> Iterator[Trial]:
    return bench.cases(huge_png, text_bomb, many_frames, zip_bomb, many_scans, nested_tiff, huge_tiff)


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


class Judge:
    """What Pillow itself makes of each file, in a process of its own: the pixels as RGB, or None if it refuses it.

    Only where that is simple: no transparency, no profile, no orientation, the right size. Else the name is left out.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    def __call__(self) -> None:
        import numpy as np
        from PIL import Image

        found: dict[str, Any] = {}
        for path in sorted(self.folder.iterdir()):
            try:
                with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")) as image:
                    image.load()
                    plain = image.mode == "RGB" and image.size == (SIDE, SIDE) and not image.has_transparency_data
                    if plain and not image.getexif() and not image.info.get("icc_profile"):
                        found[path.name] = np.asarray(image)
            except Exception:
                found[path.name] = None
        np.savez(self.out, **{name: pixels for name, pixels in found.items() if pixels is not None})
        self.out.with_suffix(".json").write_text(json.dumps([name for name, pixels in found.items() if pixels is None]))


def prepared_damaged(lab: Lab, suffix: str, seed: int) -> Trial:
    """Some damaged images of a format, prepared together with one that is sound."""
    import numpy as np

    chance, room = random.Random(seed), lab.room()
    (room / "in").mkdir()
    (room / "in" / "sound.png").write_bytes(encoded(picture(), "png"))
    for number in range(BATCH):
        data = encoded(picture(seed=number), suffix)
        (room / "in" / f"{number:02}.{suffix}").write_bytes(damage.mutated(data, chance))
    judged = lab.diffkit("--version", setup=[Judge(room / "in", room / "judged.npz")])
    outcome = prepare(lab, room)
    problem = outcome.unlike(0) or bounded(outcome) or judged.unlike(0)
    if not problem:
        refused, sound, ours = (
            json.loads((room / "judged.json").read_text()),
            np.load(room / "judged.npz"),
            stored(room),
        )
        wrong = [name for name in refused if name in ours]
        other = [name for name in sound if name in ours and not np.array_equal(ours[name], sound[name])]
        problem = f"stored, though Pillow refuses it: {', '.join(wrong)}. " if wrong else ""
        problem += f"stored otherwise than Pillow reads it: {', '.join(other)}" if other else ""
    Lab.clear(room)
    return Trial(f"{BATCH} damaged .{suffix}, seed {seed}", problem, BATCH)


def _alone(lab: Lab, room: Path, name: str, data: bytes, *, rejected: bool) -> str:
    """A file beside a sound one: rejected or stored, with bounded time and memory."""
    (room / "in").mkdir()
    (room / "in" / "sound.png").write_bytes(encoded(picture(), "png"))
    (room / "in" / name).write_bytes(data)
    outcome = prepare(lab, room)
    if problem := outcome.unlike(0) or bounded(outcome):
        return problem
    if rejected and name in stored(room):
        return "was stored"
    return "" if "sound.png" in stored(room) else "the sound image beside it is gone"


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


def huge_png(lab: Lab, room: Path) -> str:
    """A PNG of 200 megapixels in 600 KB."""
    return _alone(lab, room, "huge.png", png(20_000, 10_000), rejected=True)


def text_bomb(lab: Lab, room: Path) -> str:
    """A PNG with a text that unpacks to 100 MB."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))
    return _alone(lab, room, "text.png", png(8, 8, text), rejected=False)


def many_frames(lab: Lab, room: Path) -> str:
    """A GIF of 100,000 frames."""
    data = encoded(picture(), "gif")
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return _alone(lab, room, "frames.gif", data[:-1] + frame * 100_000 + b"\x3b", rejected=False)


def zip_bomb(lab: Lab, room: Path) -> str:
    """A zip whose member unpacks to 900 MB."""
    with zipfile.ZipFile(room / "in.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sound.png", encoded(picture(), "png"))
        with archive.open("bomb.png", "w") as member:
            member.write(encoded(picture(), "png"))
            for _ in range(900):
                member.write(bytes(10**6))
    outcome = prepare(lab, room, source="in.zip")
    return outcome.unlike({0, 3}) or bounded(outcome)


def many_scans(lab: Lab, room: Path) -> str:
    """A JPEG that is refined 20,000 times."""
    from PIL import Image

    data = encoded(Image.new("RGB", (2048, 2048), (99, 150, 200)), "jpg", progressive=True)
    at = data.rindex(b"\xff\xda")
    return _alone(lab, room, "scans.jpg", data[:at] + data[at:-2] * 20_000 + data[-2:], rejected=False)


def nested_tiff(lab: Lab, room: Path) -> str:
    """A TIFF whose directory follows itself."""
    data = bytearray(encoded(picture(), "tif"))
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    struct.pack_into(f"{order}I", data, at + 2 + 12 * count, at)
    return _alone(lab, room, "nested.tif", bytes(data), rejected=False)


def huge_tiff(lab: Lab, room: Path) -> str:
    """A TIFF that says it has 2^31 rows."""
    data = bytearray(encoded(picture(), "tif"))
    (at,) = struct.unpack_from("<I", data, 4)
    for entry in range(at + 2, at + 2 + 12 * struct.unpack_from("<H", data, at)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == 257:
            struct.pack_into("<HHII", data, entry, 257, 4, 1, 2**31 - 1)
    return _alone(lab, room, "huge.tif", bytes(data), rejected=True)


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
