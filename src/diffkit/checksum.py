"""A checksum that a file carries of itself: the sha256 of all of it, with zeros in place of its own digits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

ZEROS = b"0" * 64

Bytes = bytes | bytearray | memoryview


def sealed(head: bytes, rest: Iterable[Bytes] = ()) -> bytes:
    """`head` with the checksum of itself and `rest`, which follows it, in place of the first `ZEROS` in it."""
    return head.replace(ZEROS, _digest(head, rest), 1)


def is_intact(head: bytes, start: int, rest: Iterable[Bytes] = ()) -> bool:
    """Whether the checksum that begins at byte `start` of `head` is that of `head` and `rest`."""
    stop = start + len(ZEROS)
    return head[start:stop] == _digest(head[:start] + ZEROS + head[stop:], rest)


def _digest(head: bytes, rest: Iterable[Bytes]) -> bytes:
    digest = hashlib.sha256(head)
    for piece in rest:
        digest.update(piece)
    return digest.hexdigest().encode()
