"""Features of image sets: computed in batches, kept in a cache under the images' fingerprint."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffkit import durable
from diffkit.errors import DiffkitError
from diffkit.measure.images import ImageSet

BATCH = 64
VERSION = 1


def features(images: ImageSet, extractor: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """float32 [B, D] on the CPU, batch by batch, in the set's order; gray images are shown in three equal channels."""
    for start in range(0, images.count, BATCH):
        pixels = images.read(np.arange(start, min(start + BATCH, images.count)))
        stored = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            found = extractor(stored.expand(-1, 3, -1, -1))
        yield found.float().cpu()


def cached_features(images: ImageSet, name: str, extractor: nn.Module, device: torch.device) -> Iterator[Tensor]:
    """`features`, from the cache if they are there. `name` is the extractor with its options, written out."""
    path = _cache_file(images, name)
    if path is not None and path.exists():
        try:
            kept = torch.from_numpy(np.load(path))
        except (OSError, ValueError):
            path.unlink(missing_ok=True)  # cut off or damaged: computed again
        else:
            yield kept
            return
    pieces = []
    for piece in features(images, extractor, device):
        pieces.append(piece)
        yield piece
    if path is not None:
        _keep(path, torch.cat(pieces))


def _keep(path: Path, found: Tensor) -> None:
    """Into the cache; where that cannot be written, the features are computed again next time."""
    buffer = io.BytesIO()
    np.save(buffer, found.numpy())
    with suppress(DiffkitError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_bytes(path, buffer.getbuffer())


def _cache_file(images: ImageSet, name: str) -> Path | None:
    if not images.fingerprint:
        return None
    key = hashlib.sha256(f"{VERSION}\n{images.fingerprint}\n{name}".encode()).hexdigest()[:32]
    return durable.cache_folder() / "features" / f"{key}.npy"
