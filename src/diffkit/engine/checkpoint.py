"""Checkpoints: a folder for each, complete or absent, verified before it is used or an older one is deleted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffkit import durable
from diffkit.engine.modelfile import read_tensors, write_tensors
from diffkit.errors import DiffkitError, ExitCode

FILE = "state.safetensors"
KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """All that training needs to go on: tensors by name, and the images seen."""

    tensors: dict[str, Tensor]
    images_seen: int
    meta: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> Path:
    """Write `folder/images-N`, read it back, then delete all but the newest `keep`."""
    target = folder / f"images-{checkpoint.images_seen:012d}"
    if not target.exists():
        with durable.new_folder(target) as temporary:
            header = {"images_seen": checkpoint.images_seen, **checkpoint.meta}
            write_tensors(temporary / FILE, checkpoint.tensors, header)
    read_tensors(target / FILE)
    for old in _found(folder)[keep:]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest usable checkpoint, and a line about each newer one that is damaged.

    None if there has never been one. Raises DiffkitError if all are damaged: never a silent fresh start.
    """
    for stray in folder.glob(".*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)
    problems: list[str] = []
    found = _found(folder)
    for path in found:
        try:
            tensors, header = read_tensors(path / FILE)
            return Checkpoint(tensors, int(header["images_seen"]), header), problems
        except DiffkitError as error:
            problems.append(error.message)
    if found:
        raise DiffkitError(
            f"No checkpoint in {folder} can be used: {problems[0]}",
            "Train again with a new -o, or restore a copy of the folder.",
            code=ExitCode.MODEL,
        )
    return None, problems


def _found(folder: Path) -> list[Path]:
    """Newest first."""
    return sorted(folder.glob("images-*"), reverse=True)
