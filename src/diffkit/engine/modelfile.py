"""`model.safetensors`: averaged weights and, in the header, everything that sampling needs. No pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffkit import durable, paths
from diffkit.errors import DiffkitError, ExitCode

KEY = "diffkit"
VERSION = 1
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


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and contents, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write atomically, with a checksum of the tensors in the header.

    The layout is that of safetensors.torch.save. Its bytes go to the file piece by piece, from where they are, in calls
    that release Python's lock: this may run in a thread beside the training. Raises DiffkitError for a type of numbers
    that safetensors does not know.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if tensor.dtype not in TYPES:
            raise DiffkitError(f"{name} is of type {tensor.dtype}, which no file of weights can hold.")
    text = json.dumps({**header, "version": VERSION, "sha256": tensors_hash(plain)}, ensure_ascii=False)
    index: dict[str, Any] = {"__metadata__": {KEY: text}}
    names, end = sorted(plain, key=lambda name: (-plain[name].element_size(), name)), 0
    for name in names:
        begin, end = end, end + plain[name].nbytes
        shape = list(plain[name].shape)
        index[name] = {"dtype": TYPES[plain[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    durable.write_bytes(path, len(head).to_bytes(8, "little"), head, *(_content(plain[name]) for name in names))


def _content(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def read_model_header(path: Path) -> dict[str, Any]:
    """The header of a model. Raises DiffkitError if the file is none, too new, or else, such as a checkpoint."""
    return _model_header(path, _read(path, with_tensors=False)[1])


def read_model(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and header of a model, verified."""
    tensors, header = read_tensors(path)
    return tensors, _model_header(path, header)


def _model_header(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    if not {"settings", "spec", "mean", "images_seen"} <= header.keys():
        raise DiffkitError(
            f"{path} is not a model, but part of a checkpoint.",
            "Name the run, or the model.safetensors in it.",
            code=ExitCode.MODEL,
        )
    return header


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header, the checksum verified. Raises DiffkitError if anything is damaged."""
    tensors, header = _read(path, with_tensors=True)
    if tensors_hash(tensors) != header.get("sha256"):
        raise _unusable(path, "its contents do not match its checksum")
    return tensors, header


def _read(path: Path, *, with_tensors: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header through one handle: the file may be replaced by a newer one at any time."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _unusable(path, f"it is truncated or no safetensors file ({error})") from error
    if KEY not in metadata:
        raise _unusable(path, "it is a safetensors file, but not one of diffkit's")
    try:
        header = json.loads(metadata[KEY])
    except json.JSONDecodeError as error:
        raise _unusable(path, "its header is damaged") from error
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise _unusable(path, "its header is damaged")
    if header["version"] > VERSION:
        raise DiffkitError(
            f"{path} is of format {header['version']}; this diffkit reads up to {VERSION}.",
            "Upgrade with: pip install -U diffkit.",
            code=ExitCode.MODEL,
        )
    return tensors, header


def _unusable(path: Path, reason: str) -> DiffkitError:
    if not paths.exists(path):
        return DiffkitError(f"There is no file {path}.", code=ExitCode.MODEL)
    return DiffkitError(
        f"{path} cannot be used: {reason}.",
        "Take another copy, or one of the run's checkpoints: run the same `diffkit train` again to write it anew.",
        code=ExitCode.MODEL,
    )
