"""Writing a prepared data set: rows streamed to .npy shards, sums and counts kept on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from diffkit import durable
from diffkit.engine.store import KINDS, Pixels, Shard, file_sha256

_HEADER_BYTES = 128
_PREFIX = {"train": "", "holdout": "holdout-"}


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a version 1.0 .npy file, always 128 bytes long, so that it can be written last."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    room = _HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + room.to_bytes(2, "little") + text.ljust(room - 1).encode("ascii") + b"\n"


class ShardWriter:
    """Images of one kind and part, in source order, never more than one of them in memory."""

    def __init__(self, folder: Path, kind: str, part: str, row: tuple[int, ...], shard_images: int) -> None:
        self.folder, self.kind, self.part, self.row, self.shard_images = folder, kind, part, row, shard_images
        self.sizes: list[int] = []
        self._file: BinaryIO | None = None

    @property
    def count(self) -> int:
        """Images written so far."""
        return sum(self.sizes)

    def add(self, pixels: Pixels) -> None:
        """Append one image [H, W, C]."""
        if self._file is None:
            path = self._path(self.kind, len(self.sizes))
            with durable.explained(path):
                self._file = durable.create(path)
            self.sizes.append(0)
            durable.write_to(self._file, npy_header("|u1", (0, *self.row)))
        durable.write_to(self._file, np.ascontiguousarray(pixels).data)
        self.sizes[-1] += 1
        if self.sizes[-1] == self.shard_images:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Write the true header, fsync and close."""
        if self._file is None:
            return
        self._file.seek(0)
        durable.write_to(self._file, npy_header("|u1", (self.sizes[-1], *self.row)))
        with durable.explained(Path(self._file.name)):
            durable.sync_file(self._file)
            self.close()

    def close(self) -> None:
        """Let go of the open file, finished or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write_beside(self, kind: str, rows: npt.NDArray[Any]) -> None:
        """Rows [N, ...] of another kind for all images, in shards as long as theirs."""
        start = 0
        for number, size in enumerate(self.sizes):
            shard = np.ascontiguousarray(rows[start : start + size], KINDS[kind])
            durable.write_bytes(self._path(kind, number), npy_header(KINDS[kind], shard.shape) + shard.tobytes())
            start += size

    def shards(self, kind: str) -> list[Shard]:
        """What was written of a kind, read back for its sha256."""
        found = []
        for number, size in enumerate(self.sizes):
            path = self._path(kind, number)
            found.append(Shard(path.name, kind, self.part, size, file_sha256(path)))
        return found

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{_PREFIX[self.part]}{kind}-{number:05d}.npy"


class LineWriter:
    """A JSON-lines file, written line by line and made durable at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = durable.create(path)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        durable.write_to(self._file, durable.json_line(record))

    def finish(self) -> None:
        """fsync and close."""
        with durable.explained(self.path):
            durable.sync_file(self._file)
            self._file.close()

    def close(self) -> None:
        """Let go of the open file, finished or not."""
        self._file.close()


class Moments:
    """Per-channel sums in exact integers: the mean does not depend on any order or rounding."""

    def __init__(self, channels: int) -> None:
        self.pixels = 0
        self.sums = [0] * channels
        self.squares = [0] * channels

    def add(self, pixels: Pixels) -> None:
        """Count one image [H, W, C] in."""
        flat = pixels.reshape(-1, pixels.shape[-1])
        self.pixels += len(flat)
        for channel in range(pixels.shape[-1]):
            values = flat[:, channel].astype(np.int64)
            self.sums[channel] += int(values.sum())
            self.squares[channel] += int(values @ values)

    def mean(self) -> list[float]:
        """Per channel, in units of [-1, 1]."""
        return [total / self.pixels / 127.5 - 1 for total in self.sums]

    def variance(self) -> list[float]:
        """Per channel, in units of [-1, 1]; the numerator is exact, so nothing cancels."""
        scale = (self.pixels * 127.5) ** 2
        pairs = zip(self.sums, self.squares, strict=True)
        return [(self.pixels * square - total * total) / scale for total, square in pairs]

    def std(self) -> list[float]:
        """Per channel, in units of [-1, 1]."""
        return [math.sqrt(value) for value in self.variance()]

    def sigma_data(self) -> float:
        """Root mean square of the values; at least one gray level, so that nothing is ever divided by 0.

        About zero, not about the mean: networks get x itself, and for a set with white or black backgrounds the
        mean is most of what there is.
        """
        squares = [variance + mean**2 for variance, mean in zip(self.variance(), self.mean(), strict=True)]
        return max(math.sqrt(sum(squares) / len(squares)), 1 / 127.5)
