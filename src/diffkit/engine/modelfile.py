"""`model.safetensors`: averaged weights and, in the header, everything that sampling needs. No pickle.

A file is that of safetensors, whose metadata begin with a sha256 of the whole file: of every byte of it, with zeros in
place of the checksum's own 64 digits. It is verified before anything else is made of the file. Format 1, which is
still read, has a checksum of the tensors only.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, StrictInt, StrictStr, TypeAdapter, ValidationError
from torch import Tensor

from diffkit import durable
from diffkit.checksum import ZEROS, is_intact, sealed
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec

KEY = "diffkit"
VERSION = 2
LARGEST_HEADER = 2**23  # bytes: some 50,000 tensors
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_NAMES = {name: dtype for dtype, name in TYPES.items()}
_LEAD = b'{"__metadata__":{"sha256":"'


class Newer(DiffkitError):
    """A file is sound, but of a format that this diffkit does not know."""


class ModelHeader(BaseModel):
    """What the header of a model holds, as far as it is read."""

    model_config = ConfigDict(extra="allow")
    settings: dict[str, Any]
    spec: dict[str, Any]
    mean: list[float]
    images_seen: NonNegativeInt


class _Entry(BaseModel):
    """A tensor in the header of safetensors."""

    model_config = ConfigDict(extra="forbid")
    dtype: StrictStr
    shape: list[StrictInt]
    data_offsets: tuple[StrictInt, StrictInt]


class _Head(NamedTuple):
    """A header: where each tensor lies in the file's data, diffkit's own values, and the checksum.

    whole: whether that is one of the whole file (else of the tensors: format 1).
    """

    entries: dict[str, _Entry]
    values: dict[str, Any]
    sha256: str
    whole: bool


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write atomically, with a checksum of the whole file in its header.

    The layout is that of safetensors.torch.save. Its bytes go to the file piece by piece, from where they are, in calls
    that release Python's lock: this may run in a thread beside the training. Raises DiffkitError for a type of numbers
    that safetensors does not know.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in TYPES:
            raise DiffkitError(f"{name} is of type {tensor.dtype}, which no file of weights can hold.")
    values = {key: value for key, value in header.items() if key != "sha256"}
    text = json.dumps({**values, "version": VERSION}, ensure_ascii=False)
    index: dict[str, Any] = {"__metadata__": {"sha256": ZEROS.decode(), KEY: text}}
    names, end = sorted(plain, key=lambda name: (-plain[name].element_size(), name)), 0
    for name in names:
        begin, end = end, end + plain[name].nbytes
        shape = list(plain[name].shape)
        index[name] = {"dtype": TYPES[plain[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode(errors="backslashreplace")
    head += b" " * (-len(head) % 8)
    contents = [_content(plain[name]) for name in names]
    durable.remove_stale(path.parent, path.name)
    durable.write_bytes(path, sealed(len(head).to_bytes(8, "little") + head, contents), *contents)


def _content(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def read_model_header(path: Path) -> dict[str, Any]:
    """The header of a model, after the whole file has been verified. Raises DiffkitError as `read_model`."""
    return _model_header(path, _read(path)[0].values)


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and header of a model, verified.

    Raises DiffkitError (exit code 7) if the file is missing, damaged, too new, or else, such as a checkpoint.
    """
    tensors, header = read_tensors(path)
    return tensors, _model_header(path, header)


def _model_header(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    if not ModelHeader.model_fields.keys() <= header.keys():
        raise DiffkitError(
            f"{path} is not a model, but part of a checkpoint.",
            "Name the run, or the model.safetensors in it.",
            code=ExitCode.MODEL,
        )
    try:
        ModelHeader.model_validate(header, strict=True)
        spec = ImageSpec.from_dict(header["spec"])
    except (ValidationError, TypeError, ValueError) as error:
        raise _unusable(path, f"its header is damaged ({_first(error)})") from error
    if len(header["mean"]) != spec.channels or not all(map(math.isfinite, header["mean"])):
        raise _unusable(path, f"its header has the mean {header['mean']} for {spec.channels} channels")
    return header


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header, verified; the header's "sha256" is the file's checksum. Raises DiffkitError (exit code 7).

    The file is read once: what has been verified is what is returned.
    """
    head, data = _read(path)
    return dict(_tensors(head, data)), head.values


def _read(path: Path) -> tuple[_Head, bytearray]:
    """The header and the data of the tensors, once the checksum is known to be right."""
    try:
        # One handle: the file may be replaced by a newer one at any time.
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            if not 2 <= int.from_bytes(length, "little") <= min(size - 8, LARGEST_HEADER):
                raise _unusable(path, "it is truncated or not a safetensors file")
            text = file.read(int.from_bytes(length, "little"))
            head = _parsed(path, text, size - 8 - len(text))
            data = bytearray(size - 8 - len(text))
            read = file.readinto(data)
    except FileNotFoundError as error:
        raise DiffkitError(f"There is no file {path}.", code=ExitCode.MODEL) from error
    except OSError as error:
        raise _unusable(path, f"it cannot be read ({error.strerror or error})") from error
    if read != len(data):
        raise _unusable(path, "it is truncated")
    version = head.values["version"]
    intact = (
        is_intact(length + text, 8 + len(_LEAD), [data])
        if head.whole
        else _sha256_of_tensors(head, data) == head.sha256
    )
    if not intact:
        claim = f"; it says that it is of format {version}, this diffkit reads up to {VERSION}"
        raise _unusable(path, f"its contents do not match its checksum{claim if version > VERSION else ''}")
    if version > VERSION:
        raise Newer(
            f"{path} is of format {version}; this diffkit reads up to {VERSION}.",
            "Upgrade with: pip install -U diffkit.",
            code=ExitCode.MODEL,
        )
    return head, data


def _sha256_of_tensors(head: _Head, data: bytearray) -> str:
    """As in format 1: over names, types, shapes and contents, in order of the names."""
    digest = hashlib.sha256()
    for name, entry in sorted(head.entries.items()):
        digest.update(f"{name} {_NAMES[entry.dtype]} {entry.shape}\n".encode())
        digest.update(memoryview(data)[slice(*entry.data_offsets)])
    return digest.hexdigest()


def _parsed(path: Path, text: bytes, size: int) -> _Head:
    """The header of a file with `size` bytes of data, which its tensors have to fill."""
    try:
        index = json.loads(text, object_pairs_hook=_unique)
        metadata = index.pop("__metadata__", {})
        entries = TypeAdapter(dict[str, _Entry]).validate_python(index)
        if KEY not in metadata:
            raise _unusable(path, "it is a safetensors file, but not one of diffkit's")
        values = json.loads(metadata[KEY], object_pairs_hook=_unique)
        whole = text.startswith(_LEAD)
        version, sha256 = values["version"], (metadata if whole else values)["sha256"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _unusable(path, f"its header is damaged ({_first(error)})") from error
    if not isinstance(version, int) or not (whole or version == 1):
        raise _unusable(path, "its header is damaged (its version)")
    _check_layout(path, entries, size)
    return _Head(entries, {**values, "sha256": sha256}, sha256, whole)


def _check_layout(path: Path, entries: dict[str, _Entry], size: int) -> None:
    """The tensors have to fill the data without gaps or overlaps, each as long as its shape says."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = _NAMES.get(entry.dtype)
        if dtype is None or any(extent < 0 for extent in entry.shape):
            raise _unusable(path, f"{name} is of type {entry.dtype} and shape {entry.shape}")
        begin, stop = entry.data_offsets
        if begin != end or stop - begin != math.prod(entry.shape) * dtype.itemsize or begin % dtype.itemsize:
            raise _unusable(path, f"{name} lies at bytes {begin} to {stop}, which does not fit")
        end = stop
    if end != size:
        what = "it is truncated" if end > size else "it is too long"
        raise _unusable(path, f"{what}: its tensors take {end} bytes, and it holds {size}")


def _tensors(head: _Head, data: bytearray) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, which share the memory of `data`."""
    for name, entry in head.entries.items():
        dtype, count = _NAMES[entry.dtype], math.prod(entry.shape)
        if count:
            yield (
                name,
                torch.frombuffer(data, dtype=dtype, count=count, offset=entry.data_offsets[0]).reshape(entry.shape),
            )
        else:
            yield name, torch.empty(entry.shape, dtype=dtype)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that it has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _first(error: Exception) -> str:
    """What is wrong, in a few words."""
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].lower()}"[:200]
    return f"{type(error).__name__}: {error}"[:200]


def _unusable(path: Path, reason: str) -> DiffkitError:
    return DiffkitError(
        f"{path} cannot be used: {reason}.",
        "Take another copy, or one of the run's checkpoints: run the same `diffkit train` again to write it anew.",
        code=ExitCode.MODEL,
    )
