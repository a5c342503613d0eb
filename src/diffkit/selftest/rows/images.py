"""Images that are damaged, or enormous."""

from __future__ import annotations

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
from diffkit.selftest.lab import Lab
from diffkit.selftest.pictures import (
    BATCH,
    FORMATS,
    SIDE,
    bounded,
    chunk,
    encoded,
    picture,
    png,
    prepare,
    stored,
)

if TYPE_CHECKING:
    pass


@row(19, "damaged images: what Pillow refuses is not stored, and what it reads is stored as it reads it", full=1800)
def damaged(bench: Bench) -> Iterator[Trial]:
    return bench.each(prepared_damaged, ((suffix, seed) for seed in range(1000) for suffix in FORMATS))


@row(20, "bombs: small files that unpack to much")
def bombs(bench: Bench) -> Iterator[Trial]:
    return bench.cases(huge_png, text_bomb, many_frames, zip_bomb, many_scans, nested_tiff, huge_tiff)


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
