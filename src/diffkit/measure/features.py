"""Features of image sets: computed batch by batch, kept in a cache under the images' fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffkit import durable
from diffkit.engine.distributed import ALONE, World
from diffkit.engine.modelfile import read_tensors, write_tensors
from diffkit.engine.peers import OtherFailed
from diffkit.errors import DiffkitError, ExitCode
from diffkit.measure.images import ImageSet

BATCH = 32
FEATURES = "features"
VERSION = 1


def features(
    images: ImageSet, extractor: nn.Module, device: torch.device, name: str = "", world: World = ALONE
) -> Generator[int, None, Tensor]:
    """Returns float32 [N, D] on the CPU, in the set's order; yields the number of images that have been looked at.

    Gray images are shown in three equal channels. `name`, the extractor with its options written out: then the features
    are taken from the cache, or put there, if the images can be told from others. Each process of `world` looks at its
    share.
    """
    path, leads = _cache_file(images, name) if name else None, world.leads
    kept = None if path is None else _kept(path)
    if not world.any(kept is None):
        assert kept is not None
        return kept
    if images.count < world.size:
        world = ALONE  # too few to share: each looks at all of them
    found, own, failed = torch.empty(0), world.share(images.count), None
    for start in range(own.start, own.stop, BATCH):
        end = min(start + BATCH, own.stop)
        try:
            pixels = images.read(np.arange(start, end))
        except DiffkitError as error:
            failed = error
            break
        stored = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            piece = extractor(stored.expand(-1, 3, -1, -1))
        if not len(found):
            found = torch.zeros(images.count, piece.shape[1])
        found[start:end] = piece
        yield min(images.count, (end - own.start) * world.size)
    if world.any(failed is not None):
        if failed is None:
            raise OtherFailed("Another process could not read its images.", code=ExitCode.DATA)
        failed.personal = world.size > 1
        raise failed
    world.add([found])
    if path is not None and leads:
        _keep(path, found)
    return found


def _kept(path: Path) -> Tensor | None:
    """What the cache has; None for a file that is missing, or whose checksum is wrong."""
    try:
        return read_tensors(path)[0][FEATURES]
    except (DiffkitError, KeyError):
        return None


def _keep(path: Path, found: Tensor) -> None:
    """Into the cache; where that cannot be written, the features are computed again next time."""
    with suppress(DiffkitError, OSError):
        durable.make_folders(path.parent)
        write_tensors(path, {FEATURES: found}, {})


def _cache_file(images: ImageSet, name: str) -> Path | None:
    if not images.fingerprint:
        return None
    key = hashlib.sha256(f"{VERSION}\n{images.fingerprint}\n{name}".encode()).hexdigest()[:32]
    return durable.cache_folder() / "features" / f"{key}.safetensors"
