"""Weights of feature extractors: given as a file, found in the cache, or downloaded to it. No file can run code."""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import pickle
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch

from diffkit import durable
from diffkit.errors import DiffkitError, ExitCode, nearest_sibling

FOLDER = "DIFFKIT_WEIGHTS"
SILENCE_SECONDS = 15.0
LEAST_BYTES_A_SECOND = 50_000
BLOCK = 2**20


def load_weights(given: str, url: str, extractor: str) -> dict[str, Any]:
    """Tensors by name: from the file `given`, else from the file of the url's name that is in the cache or downloaded.

    Raises DiffkitError if there is no such file, if it cannot be had, or if it is damaged.
    """
    path = _given(given) if given else _cached(url, extractor)
    try:
        data = path.read_bytes()
        _check(data, path.name)
        tensors: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise DiffkitError(
            f"{path} holds no weights: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            "Remove it, and take another copy.",
            code=ExitCode.MODEL,
        ) from error
    if not isinstance(tensors, dict):
        raise unfit(path.name, extractor)
    return tensors


def unfit(source: str, extractor: str) -> DiffkitError:
    """The file is one of weights, but of another network."""
    return DiffkitError(
        f"{source or 'The file'} holds weights of another network than {extractor}'s.", code=ExitCode.MODEL
    )


def _given(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise DiffkitError(f"There is no file {path}.", nearest_sibling(path).strip(), code=ExitCode.MODEL)
    return path


def _cached(url: str, extractor: str) -> Path:
    name = url.rpartition("/")[2]
    folder = Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else durable.cache_folder() / "weights"
    path = folder / name
    if not path.exists():
        try:
            data = _downloaded(url)
            _check(data, name)
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DiffkitError(
                f"The weights of {extractor} are not here, and could not be fetched from {url}: {error}.",
                f"Put {name} into {folder}, or give {extractor}:weights=FILE; lite0 needs no download.",
                code=ExitCode.MODEL,
            ) from error
        try:
            durable.write_bytes(path, data)
        except DiffkitError:  # the cache is full
            path = durable.process_folder() / name
            durable.write_bytes(path, data)
    return path


def _downloaded(url: str) -> bytes:
    """Everything at the url. Raises OSError for silence, and for a trickle that would never end."""
    begun, data = time.monotonic(), bytearray()
    with urllib.request.urlopen(url, timeout=SILENCE_SECONDS) as answer:
        size = int(answer.headers.get("Content-Length") or 0)
        while block := answer.read1(BLOCK):
            data += block
            seconds = time.monotonic() - begun
            if seconds > SILENCE_SECONDS and len(data) < LEAST_BYTES_A_SECOND * seconds:
                raise TimeoutError(f"only {len(data):,} bytes in {seconds:.0f} seconds")
    if size and len(data) != size:
        raise ValueError(f"{len(data):,} bytes came of {size:,}")
    return bytes(data)


def _check(data: bytes, name: str) -> None:
    """A name that ends in eight hexadecimal digits promises the beginning of the content's sha256."""
    promised = name.rpartition(".")[0].rpartition("-")[2]
    if len(promised) == 8 and all(c in "0123456789abcdef" for c in promised):
        found = hashlib.sha256(data).hexdigest()
        if not found.startswith(promised):
            raise ValueError(f"its sha256 begins with {found[:8]}, not {promised}")
