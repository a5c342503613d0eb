"""Files changed as a disk, a transfer or a mischief may change them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def flip(file: Path, bit: int) -> None:
    """Flip one bit, counted from the first of the file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def lengths(size: int) -> Iterator[int]:
    """Where a file is cut off: nothing left, one byte, every 4 KiB, all but the last byte."""
    yield from dict.fromkeys((0, 1, *range(4096, size, 4096), size - 1))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few random changes: bits flipped, bytes replaced, pieces cut out, doubled, moved or zeroed, the end cut off."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4, 8))):
        if not found:
            break
        at, long = chance.randrange(len(found)), chance.choice((1, 1, 2, 4, 16, 64))
        piece = found[at : at + long]
        match chance.randrange(8):
            case 0 | 1:
                found[at] ^= 1 << chance.randrange(8)
            case 2:
                found[at : at + long] = chance.randbytes(len(piece))
            case 3:
                del found[at : at + long]
            case 4:
                found[at:at] = piece * chance.choice((1, 2, 50))
            case 5:
                found[at : at + long] = bytes(len(piece))
            case 6:
                to = chance.randrange(len(found))
                found[to : to + long] = piece
            case 7:
                del found[at:]
    return bytes(found)


VALUES: tuple[object, ...] = (
    "",
    "x",
    "\u2028",
    "../../x",
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    0.5,
    1e308,
    True,
    None,
    [],
    {},
    [[]],
    {"a": 1},
)
ODD = (float("nan"), float("inf"), -float("inf"))


def changed(value: object, chance: random.Random) -> object:
    """A nested value as JSON or TOML has it, with one thing in it removed, doubled, or of another type or size."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        copy = dict(value)
        if chance.random() < 0.15:
            del copy[key]
        elif chance.random() < 0.1:
            copy[f"{key}x"] = copy.pop(key)
        else:
            copy[key] = changed(copy[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.8:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], changed(value[at], chance), *value[at + 1 :]]
    return chance.choice((*VALUES, *ODD))
