"""The prepared data set on disk, and how it is read: plain .npy shards, memory-mapped, and dataset.json."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt

from diffkit import durable, paths
from diffkit.checksum import ZEROS, is_intact, sealed
from diffkit.engine.processors import processors
from diffkit.errors import DiffkitError, ExitCode, nearest_sibling
from diffkit.interfaces import ImageSpec
from diffkit.names import command

FORMAT = "diffkit-dataset"
VERSION = 2
INDEX_FILE = "dataset.json"
PARTS = ("train", "holdout")
_LEAD = b'{\n  "sha256": "'
KINDS = {"images": "|u1", "labels": "<i8", "attributes": "<f4", "inputs": "|u1"}

Pixels: TypeAlias = npt.NDArray[np.uint8]
Indices: TypeAlias = npt.NDArray[np.int64]

_verified: set[tuple[object, ...]] = set()
"""The states of data sets that this process has compared with their checksums."""


@dataclass(frozen=True)
class Shard:
    """One .npy file: `kind` "images" (uint8 [N, H, W, C]), "labels" (int64 [N], -1 = no label), "attributes" (float32
    [N, A], NaN = unknown) or "inputs" (uint8 [N, H, W, C'], the paired images)."""

    file: str
    kind: str
    part: str
    images: int
    sha256: str


class _Index(BaseModel):
    """What dataset.json holds, as far as it is read. `records`: sha256 of the JSON-lines files (none in format 1)."""

    spec: dict[str, Any]
    count: PositiveInt
    holdout_count: NonNegativeInt
    mean: list[FiniteFloat]
    std: list[FiniteFloat]
    sigma_data: Annotated[FiniteFloat, Field(gt=0)]
    class_counts: dict[str, NonNegativeInt]
    shards: list[Shard]
    records: dict[str, str] = {}


class _Rows:
    """Several arrays, read as if they were one."""

    def __init__(self, arrays: list[npt.NDArray[Any]]) -> None:
        self.arrays = arrays
        self.starts = np.cumsum([0] + [len(array) for array in arrays])

    def gather(self, indices: Indices) -> npt.NDArray[Any]:
        """The rows at `indices`, in their order."""
        if len(indices) and (indices.min() < 0 or indices.max() >= self.starts[-1]):
            raise IndexError(f"image index outside 0 to {self.starts[-1] - 1}")
        which = np.searchsorted(self.starts, indices, side="right") - 1
        offsets = indices - self.starts[which]
        first = self.arrays[which[0]] if len(which) else self.arrays[0]
        if (which == which[:1]).all():
            rows: npt.NDArray[Any] = first[offsets]
            return rows
        rows = np.empty((len(indices), *first.shape[1:]), dtype=first.dtype)
        for place, (number, offset) in enumerate(zip(which.tolist(), offsets.tolist(), strict=True)):
            rows[place] = self.arrays[number][offset]
        return rows


class Store:
    """A prepared data set, opened for reading.

    `mean` and `std` are per channel, over the training part, in units of [-1, 1]; `sigma_data` is the root
    mean square of all values; `class_counts` counts training images by class; `fingerprint` is a
    sha256 over what the shards hold, the same wherever the folder lies.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        """Use `Store.open`. Raises ValueError where `index` is incomplete or contradicts itself."""
        self.path = path
        self.index = index
        known = _Index.model_validate_json(json.dumps(index), strict=True)
        self.spec = ImageSpec.from_dict(known.spec)
        self.count, self.holdout_count = known.count, known.holdout_count
        self.mean, self.std, self.sigma_data = tuple(known.mean), tuple(known.std), known.sigma_data
        self.class_counts, self.shards, self.records = known.class_counts, known.shards, known.records
        if not len(self.mean) == len(self.std) == self.spec.channels:
            raise ValueError(f"mean and std are not of {self.spec.channels} channels")
        if set(self.class_counts) - set(self.spec.classes):
            raise ValueError("a class is counted that the set does not have")
        files = [shard.file for shard in self.shards] + list(self.records)
        if any(Path(file).name != file for file in files):
            raise ValueError("a shard lies outside the folder")
        self.fingerprint = _fingerprint(self.spec, self.shards)
        self._rows: dict[tuple[str, str], _Rows] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Store:
        """Open the folder that `diffkit prepare` wrote; only headers are read, unless `verify` (see `check`).

        Raises DiffkitError (code DATA) for anything missing, damaged, truncated or newer than this diffkit.
        """
        folder = Path(path)
        store = cls._parse(folder, _read_index(folder))
        for part in PARTS:
            for kind in KINDS:
                arrays = [store._map(s) for s in store.shards if (s.part, s.kind) == (part, kind)]
                if arrays:
                    store._rows[part, kind] = _Rows(arrays)
        store._check_counts()
        if verify:
            store.check()
        return store

    @classmethod
    def _parse(cls, folder: Path, index: dict[str, Any]) -> Store:
        try:
            return cls(folder, index)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise _damaged(folder, f"{INDEX_FILE} is incomplete ({type(error).__name__}: {error})") from error

    def gather(self, indices: Indices, part: str = "train") -> tuple[Pixels, Indices | None]:
        """indices int64 [B] -> images uint8 [B, H, W, C] and class indices int64 [B] (-1 = no label).

        The labels are None where the set has no classes. Raises IndexError for an index out of range.
        """
        images = self._rows.get((part, "images"))
        if images is None:
            raise IndexError(f"the data set has no {part} images")
        return images.gather(indices), self.column("labels", indices, part)

    def column(self, kind: str, indices: Indices, part: str = "train") -> npt.NDArray[Any] | None:
        """Rows of another kind, "labels", "attributes" or "inputs" (see `Shard`); None where the set has none."""
        rows = self._rows.get((part, kind))
        return None if rows is None else rows.gather(indices)

    @property
    def _checksums(self) -> dict[str, str]:
        """sha256 of each file, by its name."""
        return {shard.file: shard.sha256 for shard in self.shards} | self.records

    @property
    def nbytes(self) -> int:
        """What all shards take on the disk, but for their headers."""
        return sum(array.nbytes for rows in self._rows.values() for array in rows.arrays)

    def check(self) -> None:
        """Compare every file with its checksum, once in a process while the files stay as they are.

        Raises DiffkitError (code DATA) naming what has changed.
        """
        if (state := self._state()) not in _verified:
            if problems := self.verify():
                raise _damaged(self.path, "; ".join(problems[:3]))
            _verified.add(state)

    def verify(self) -> list[str]:
        """Read every file and compare its sha256: one sentence per problem, an empty list if all is well."""
        with ThreadPoolExecutor(min(8, processors())) as pool:
            return [
                problem for problem in pool.map(self._problem, *zip(*self._checksums.items(), strict=True)) if problem
            ]

    def _problem(self, name: str, expected: str) -> str:
        try:
            found = file_sha256(self.path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found == expected:
            return ""
        return f"{name} has changed: its sha256 begins with {found[:12]}, not {expected[:12]}"

    def _state(self) -> tuple[object, ...]:
        """Changes when a file does."""
        found = [(self.path / name).stat() for name in self._checksums if (self.path / name).exists()]
        times = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in found]
        return (self.path.resolve(), tuple(self._checksums.items()), tuple(times))

    def _map(self, shard: Shard) -> npt.NDArray[Any]:
        """A shard as a memory-mapped array, once its header and its size are what they should be."""
        path = self.path / shard.file
        wanted = ((shard.images, *row_shape(self.spec, shard.kind)), np.dtype(KINDS[shard.kind]))
        try:
            shape, dtype, offset = _npy_header(path)
            size = path.stat().st_size
        except FileNotFoundError as error:
            raise _damaged(self.path, f"{shard.file} is missing") from error
        except PermissionError as error:
            raise paths.unreadable(path, error) from error
        except Exception as error:  # a damaged header is parsed as Python: any error may come of it
            raise _damaged(self.path, f"{shard.file} cannot be read ({error})") from error
        if (shape, dtype) != wanted:
            raise _damaged(self.path, f"{shard.file} holds {dtype} {shape}, expected {wanted[1]} {wanted[0]}")
        expected = offset + int(np.prod(shape)) * dtype.itemsize
        if size != expected:
            raise _damaged(self.path, f"{shard.file} is {size:,} bytes long, expected {expected:,}")
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape))

    def _check_counts(self) -> None:
        kinds = kinds_of(self.spec)
        for part, count in (("train", self.count), ("holdout", self.holdout_count)):
            for kind in kinds:
                rows = self._rows.get((part, kind))
                found = 0 if rows is None else int(rows.starts[-1])
                if found != count:
                    raise _damaged(self.path, f"the {part} {kind} shards hold {found} rows, expected {count}")


def kinds_of(spec: ImageSpec) -> list[str]:
    """The kinds of rows that a data set of this spec holds."""
    there = {"labels": spec.classes, "attributes": spec.attributes, "inputs": spec.image_channels}
    return ["images", *(kind for kind, some in there.items() if some)]


def row_shape(spec: ImageSpec, kind: str) -> tuple[int, ...]:
    """The shape of one row."""
    channels = {"images": spec.channels, "inputs": spec.image_channels}
    if kind in channels:
        return (spec.height, spec.width, channels[kind])
    return (len(spec.attributes),) if kind == "attributes" else ()


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _fingerprint(spec: ImageSpec, shards: list[Shard]) -> str:
    content = [[s.kind, s.part, s.images, s.sha256] for s in shards]
    canonical = json.dumps([spec.to_dict(), content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, dtype and the offset of the data. Raises ValueError for anything but a plain C-ordered array."""
    with path.open("rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("not version 1.0 of the .npy format")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if fortran or dtype.hasobject:
            raise ValueError("not a plain array")
        return shape, dtype, file.tell()


def write_index(path: Path, index: Mapping[str, Any]) -> None:
    """Write dataset.json, with a checksum of itself."""
    text = json.dumps({"sha256": ZEROS.decode(), **index}, indent=2, ensure_ascii=False) + "\n"
    durable.write_bytes(path, sealed(text.encode(errors="backslashreplace")))


def _read_index(folder: Path) -> dict[str, Any]:
    """dataset.json, once it is known to be intact and one that this version understands."""
    try:
        text = (folder / INDEX_FILE).read_bytes()
        index = json.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_prepared(folder) from error
    except PermissionError as error:
        raise paths.unreadable(folder / INDEX_FILE, error) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{INDEX_FILE} cannot be read ({error})") from error
    whole = text.startswith(_LEAD)
    if not isinstance(index, dict) or not (whole or index.get("format") == FORMAT):
        raise _not_prepared(folder)
    version = index.get("version")
    intact = is_intact(text, len(_LEAD)) if whole else version == 1 or not isinstance(version, int)
    if isinstance(version, int) and version > VERSION and (intact or not whole):
        raise DiffkitError(
            f"{folder} was prepared by a newer diffkit: format version {version}, this one reads {VERSION}.",
            "Upgrade diffkit, or prepare the images again.",
            code=ExitCode.DATA,
        )
    if not intact:
        raise _damaged(folder, f"{INDEX_FILE} has changed since it was written: it does not match its checksum")
    return index


def _not_prepared(folder: Path) -> DiffkitError:
    """Missing, or something else than a prepared data set."""
    if paths.exists(folder):
        hint = f"Run: {command('prepare', folder)}"
        return DiffkitError(f"{folder} is not a prepared data set.", hint, code=ExitCode.DATA)
    near = nearest_sibling(folder)
    return DiffkitError(f"There is no {folder}.", f"{near}Prepare one with: diffkit prepare IMAGES", code=ExitCode.DATA)


def _damaged(folder: Path, what: str) -> DiffkitError:
    return DiffkitError(f"The prepared data set {folder} is damaged: {what}.", "Prepare it again.", code=ExitCode.DATA)
