"""Snapshots of the averages of different lengths, from which an average of any length is made after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import durable
from diffkit.core.ema import combination, gamma_of
from diffkit.engine.modelfile import read_model, read_model_header, write_tensors
from diffkit.engine.train import under
from diffkit.errors import DiffkitError, ExitCode

SPACING = 10_000


@dataclass(frozen=True)
class Averaged:
    """Weights averaged with a profile of relative length `length`, put together after training.

    `error`: how far the profile is from the one wanted, relative to it. `header`: that of a model.
    """

    length: float
    error: float
    tensors: dict[str, Tensor]
    header: dict[str, Any]


def save_snapshot(
    folder: Path, averages: Mapping[str, Tensor], lengths: Sequence[float], header: Mapping[str, Any], keep: int
) -> None:
    """Write the averages of these lengths, then delete until `keep` snapshots are left, evenly spaced.

    averages: by length and name, "0.05.NAME". header: that of the model as it was then.
    """
    durable.make_folders(folder)
    write_tensors(_path(folder, header["images_seen"]), averages, {**header, "lengths": list(lengths)})
    thin(folder, keep)


def thin(folder: Path, keep: int) -> None:
    """Delete snapshots until `keep` are left, evenly spaced."""
    places = [int(path.stem.split("-")[1]) for path in snapshots(folder)]
    for place in superfluous(places, keep):
        with durable.explained(_path(folder, place)):
            durable.remove(_path(folder, place))


def has_snapshot(folder: Path, images_seen: int) -> bool:
    """Whether there is one of that moment."""
    return _path(folder, images_seen).exists()


def snapshots(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("images-*.safetensors"))


def superfluous(places: Sequence[int], keep: int) -> list[int]:
    """Which of these (images seen, rising) to delete: again and again the one whose neighbours are nearest each other.

    The first and the last stay.
    """
    left = list(places)
    while len(left) > max(keep, 2):
        spans = [later - earlier for earlier, later in zip(left, left[2:], strict=False)]
        left.pop(1 + spans.index(min(spans)))
    return [place for place in places if place not in left]


def averaged(folder: Path, lengths: Sequence[float]) -> list[Averaged]:
    """The averages of these relative lengths at the last snapshot. Reads each snapshot once.

    Raises DiffkitError for a length that no average has, if there are no snapshots, or if one is damaged.
    """
    gammas = [_gamma(length) for length in lengths]
    paths = snapshots(folder)
    if not paths:
        raise DiffkitError(
            f"{folder.parent} has no snapshots to average.",
            "They are kept by a training that began with --ema-snapshots 16.",
            code=ExitCode.MODEL,
        )
    headers = [read_model_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if not isinstance(header.get("lengths"), list):
            raise DiffkitError(f"{path} is not a snapshot.", "Take it out of that folder.", code=ExitCode.MODEL)
    stored = [(header["images_seen"], gamma_of(length)) for header in headers for length in header["lengths"]]
    end = headers[-1]["images_seen"]
    mixes = [combination(stored, (end, gamma)) for gamma in gammas]
    sums: list[dict[str, Tensor]] = [{} for _ in lengths]
    number = 0
    for path in paths:
        tensors, header = read_model(path)
        for length in header["lengths"]:
            own = under(tensors, f"{length:g}.")
            for (weights, _), total in zip(mixes, sums, strict=True):
                _add(total, own, weights[number])
            number += 1
    header = {key: value for key, value in headers[-1].items() if key not in {"lengths", "version", "sha256"}}
    return [
        Averaged(
            length=length,
            error=error,
            tensors={name: value.to(own[name].dtype) for name, value in total.items()},
            header={**header, "ema_length": length},
        )
        for length, (_, error), total in zip(lengths, mixes, sums, strict=True)
    ]


def _add(total: dict[str, Tensor], tensors: dict[str, Tensor], weight: float) -> None:
    """In float64, since the weights have both signs. What is no floating-point number is taken from the last."""
    for name, value in tensors.items():
        if value.is_floating_point():
            total[name] = total.get(name, torch.zeros(())) + weight * value.double()
        else:
            total[name] = value


def _gamma(length: float) -> float:
    try:
        return gamma_of(length)
    except ValueError as error:
        raise DiffkitError(f"No average has length {length:g}: {error}.", "Try 0.05 to 0.15.") from error


def _path(folder: Path, images_seen: int) -> Path:
    return folder / f"images-{images_seen:012d}.safetensors"
