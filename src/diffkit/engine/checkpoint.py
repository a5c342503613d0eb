"""Checkpoints: a folder for each, complete or absent, verified before it is used or an older one is deleted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import durable, paths
from diffkit.engine.modelfile import Newer, read_tensors, write_tensors
from diffkit.errors import DiffkitError, ExitCode

FILE = "state.safetensors"
KEEP = 2
_NAME = re.compile(r"images-[0-9]{12,20}")


@dataclass(frozen=True)
class Checkpoint:
    """All that training needs to go on: tensors by name, and the images seen. `trained`: names of those that only
    the optimiser's step changes, and that have to be finite (a backbone's buffers may hold infinities on purpose).
    `config`: the sha256 of the run's config.toml, without which the tensors mean nothing; empty in format 1."""

    tensors: dict[str, Tensor]
    images_seen: int
    trained: frozenset[str] = frozenset()
    config: str = ""

    @property
    def nbytes(self) -> int:
        """What its file takes, but for the header."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> Path:
    """Write `folder/images-N`, read it back, then delete all but the newest `keep`.

    Raises DiffkitError if a weight is not finite: no such state ever reaches the disk.
    """
    if not all(bool(torch.isfinite(checkpoint.tensors[name]).all()) for name in checkpoint.trained):
        raise non_finite(checkpoint.images_seen)
    target = folder / f"images-{checkpoint.images_seen:012d}"
    if not _usable(target):
        _remove(target)
        with durable.new_folder(target) as temporary:
            write_tensors(temporary / FILE, checkpoint.tensors, _header(checkpoint))
        read_tensors(target / FILE)
    for old in _found(folder)[keep:]:
        _remove(old)
    return target


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest usable checkpoint, and what is wrong with each newer one. Changes nothing.

    None if there is none. Raises DiffkitError (exit code 7) if all are damaged, or if one is of a newer format.
    """
    problems: dict[Path, str] = {}
    found = _found(folder)
    for path in found:
        try:
            return _read(path), problems
        except Newer:
            raise
        except DiffkitError as error:
            problems[path] = error.message
    if found:
        raise DiffkitError(
            f"No checkpoint in {folder} can be used: {problems[found[0]]}",
            "Train again with a new -o, or restore a copy of the folder.",
            code=ExitCode.MODEL,
        )
    return None, problems


def kept(folder: Path) -> int:
    """How many checkpoints there are."""
    return len(_found(folder))


def set_aside(damaged: Iterable[Path]) -> None:
    """Rename damaged checkpoints, so that they neither count nor stand in the way; for the run's writer only."""
    for path in damaged:
        aside = path.with_name(f"damaged-{path.name}")
        _remove(aside)
        with durable.explained(path):
            durable.rename(path, aside)


def non_finite(images_seen: int) -> DiffkitError:
    """A weight is NaN or infinite."""
    return DiffkitError(
        f"The weights are no longer finite after {images_seen:,} images; they are not saved.",
        "Try a smaller learning rate.",
        code=ExitCode.NON_FINITE,
    )


def _header(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"images_seen": checkpoint.images_seen, "config": checkpoint.config}


def _read(path: Path) -> Checkpoint:
    """Raises DiffkitError if the checkpoint is damaged."""
    tensors, header = read_tensors(path / FILE)
    images_seen = header.get("images_seen")
    if not isinstance(images_seen, int) or images_seen < 0:
        raise DiffkitError(f"{path} is not a checkpoint: it does not say how many images were seen.")
    return Checkpoint(tensors, images_seen, config=str(header.get("config", "")))


def _remove(path: Path) -> None:
    with durable.explained(path):
        if path.exists():
            durable.remove(path)


def _usable(path: Path) -> bool:
    try:
        _read(path)
    except DiffkitError:
        return False
    return True


def _found(folder: Path) -> list[Path]:
    """Newest first. What else lies there, such as a copy under another name, is the user's."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise paths.unreadable(folder, error) from error
    return [folder / name for name in sorted(filter(_NAME.fullmatch, names), key=_images, reverse=True)]


def _images(name: str) -> int:
    """Images seen by a checkpoint of this name."""
    return int(name.removeprefix("images-"))
