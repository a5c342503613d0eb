"""Checkpoints: a folder for each, complete or absent, verified before it is used or an older one is deleted."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffkit import durable
from diffkit.engine.modelfile import read_tensors, write_tensors
from diffkit.errors import DiffkitError, ExitCode

FILE = "state.safetensors"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """All that training needs to go on: tensors by name, and the images seen. `trained`: names of those that only
    the optimiser's step changes, and that have to be finite (a backbone's buffers may hold infinities on purpose)."""

    tensors: dict[str, Tensor]
    images_seen: int
    trained: frozenset[str] = frozenset()


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> Path:
    """Write `folder/images-N`, read it back, then delete all but the newest `keep`.

    Raises DiffkitError if a weight is not finite: no such state ever reaches the disk.
    """
    if not all(bool(torch.isfinite(checkpoint.tensors[name]).all()) for name in checkpoint.trained):
        raise non_finite(checkpoint.images_seen)
    target = folder / f"images-{checkpoint.images_seen:012d}"
    if not _usable(target):
        shutil.rmtree(target, ignore_errors=True)
        with durable.new_folder(target) as temporary:
            write_tensors(temporary / FILE, checkpoint.tensors, {"images_seen": checkpoint.images_seen})
        read_tensors(target / FILE)
    for old in _found(folder)[keep:]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest usable checkpoint, and what is wrong with each newer one. Changes nothing.

    None if there has never been one. Raises DiffkitError if all are damaged: never a silent fresh start.
    """
    problems: dict[Path, str] = {}
    found = _found(folder)
    for path in found:
        try:
            tensors, header = read_tensors(path / FILE)
            return Checkpoint(tensors, int(header["images_seen"])), problems
        except DiffkitError as error:
            problems[path] = error.message
    if found:
        raise DiffkitError(
            f"No checkpoint in {folder} can be used: {problems[found[0]]}",
            "Train again with a new -o, or restore a copy of the folder.",
            code=ExitCode.MODEL,
        )
    return None, problems


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count nor stand in the way; for the run's writer only."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        durable.rename(path, aside)


def non_finite(images_seen: int) -> DiffkitError:
    """A weight is NaN or infinite."""
    return DiffkitError(
        f"The weights are no longer finite after {images_seen:,} images; they are not saved.",
        "Try a smaller learning rate.",
        code=ExitCode.NON_FINITE,
    )


def _usable(path: Path) -> bool:
    try:
        read_tensors(path / FILE)
    except DiffkitError:
        return False
    return True


def _found(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("images-*"), reverse=True)
