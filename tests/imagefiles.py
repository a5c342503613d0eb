"""Image files written byte by byte, so that tests know what is in them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Sequence

BYTE, SHORT, LONG = 1, 3, 4
_SIZES = {BYTE: "B", SHORT: "H", LONG: "I"}


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int, color: int, rows: bytes, *extra: bytes, interlaced: bool = False
) -> io.BytesIO:
    """A PNG: `rows` with their filter bytes, `extra` chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + body)


def tiff(
    width: int,
    strips: Sequence[bytes],
    photometric: int,
    bits: Sequence[int],
    *,
    order: str = "<",
    sample_format: int = 1,
    planar: int = 1,
    extra: Sequence[int] = (),
    deflated: bool = False,
) -> io.BytesIO:
    """A TIFF of one row (TIFF 6.0, baseline): one strip, or one for each plane."""
    strips = [zlib.compress(strip) if deflated else strip for strip in strips]
    tags = {
        256: (SHORT, [width]),
        257: (SHORT, [1]),
        258: (SHORT, list(bits)),
        259: (SHORT, [8 if deflated else 1]),
        262: (SHORT, [photometric]),
        273: (LONG, [0] * len(strips)),
        277: (SHORT, [len(bits)]),
        278: (SHORT, [1]),
        279: (LONG, [len(strip) for strip in strips]),
        284: (SHORT, [planar]),
        339: (SHORT, [sample_format] * len(bits)),
    }
    if extra:
        tags[338] = (SHORT, list(extra))

    def written() -> tuple[bytes, int]:
        start = 8 + 2 + 12 * len(tags) + 4
        entries, beyond = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            raw = struct.pack(f"{order}{len(values)}{_SIZES[kind]}", *values)
            if len(raw) > 4:
                raw, beyond = struct.pack(f"{order}I", start + len(beyond)), beyond + raw + b"\0" * (len(raw) % 2)
            entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
        return struct.pack(f"{order}H", len(tags)) + entries + b"\0\0\0\0" + beyond, start + len(beyond)

    place = written()[1]
    tags[273] = (LONG, [place + sum(map(len, strips[:number])) for number in range(len(strips))])
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return io.BytesIO(magic + struct.pack(f"{order}I", 8) + written()[0] + b"".join(strips))


def damaged(whole: bytes, number: int) -> bytes:
    """The file with flipped bits, a run of zeros, or its end cut off: damage `number`."""
    draw = random.Random(number)
    content = bytearray(whole)
    if number % 3 == 0:
        for _ in range(draw.randint(1, 8)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif number % 3 == 1:
        start = draw.randrange(len(content))
        stop = min(len(content), start + draw.randint(1, 200))
        content[start:stop] = bytes(stop - start)
    else:
        del content[draw.randrange(1, len(content)) :]
    return bytes(content)
