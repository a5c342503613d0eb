"""Checkpoints and models that are missing, foreign, or made to do harm."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffkit.selftest import damage
from diffkit.selftest.actions import ACTIONS
from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.rows.damage import newest, sampled


@row(8, "a checkpoint or model that is missing, of a newer format, or of another network")
def foreign(bench: Bench) -> Iterator[Trial]:
    return bench.cases(
        no_checkpoints, empty_checkpoints, damaged_checkpoints, newer_checkpoint, newer_model, other_network, no_model
    )


@row(27, "a model file made to do harm")
def harmful(bench: Bench) -> Iterator[Trial]:
    return bench.cases(
        a_pickle, a_pickle_with_the_right_name, huge_header, overlapping, twice, deep, nan_weights, a_text, a_folder
    )


def _resumed(lab: Lab, room: Path, change: Callable[[Path], object], code: int, *texts: str) -> str:
    """Change a run, and go on with it; nothing of it may be lost."""
    shutil.copytree(lab.run, room / "run")
    change(room / "run")
    model = (room / "run" / "model.safetensors").read_bytes()
    outcome = lab.diffkit(*ACTIONS["resume"].words(lab), here=room)
    kept = (room / "run" / "model.safetensors").read_bytes() == model
    return outcome.unlike(code, *texts) or ("" if kept else "the trained model was overwritten")


def no_checkpoints(lab: Lab, room: Path) -> str:
    """A trained run without its checkpoints folder."""
    return _resumed(lab, room, lambda run: shutil.rmtree(run / "checkpoints"), 7)


def empty_checkpoints(lab: Lab, room: Path) -> str:
    """A trained run whose checkpoints are gone."""
    return _resumed(lab, room, lambda run: list(map(shutil.rmtree, (run / "checkpoints").iterdir())), 7)


def damaged_checkpoints(lab: Lab, room: Path) -> str:
    """A trained run all of whose checkpoints are damaged."""

    def harm(run: Path) -> None:
        for path in run.glob("checkpoints/*/*"):
            damage.flip(path, 20_000)

    return _resumed(lab, room, harm, 7)


def newer_checkpoint(lab: Lab, room: Path) -> str:
    """A checkpoint of a newer format is named as such, and left."""

    def newer(run: Path) -> None:
        from diffkit.engine import modelfile

        tensors, header = modelfile.read_tensors(newest(run))
        _as_newer(newest(run), tensors, header)

    return _resumed(lab, room, newer, 7, "format 99")


def newer_model(lab: Lab, room: Path) -> str:
    """A model of a newer format is named as such."""
    from diffkit.engine.modelfile import read_tensors

    _as_newer(room / "new.safetensors", *read_tensors(lab.run / "model.safetensors"))
    return sampled(lab, room, "new.safetensors").unlike(7, "format 99", "upgrade")


def _as_newer(path: Path, tensors: dict[str, Any], header: dict[str, Any]) -> None:
    from diffkit.engine import modelfile

    version, modelfile.VERSION = modelfile.VERSION, 99
    try:
        modelfile.write_tensors(path, tensors, header)
    finally:
        modelfile.VERSION = version


def other_network(lab: Lab, room: Path) -> str:
    """A model whose weights are not those of its network names the first that does not fit."""
    from diffkit.engine.modelfile import read_tensors, write_tensors

    tensors, header = read_tensors(lab.run / "model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].new_zeros((3, *tensors[name].shape))
    write_tensors(room / "other.safetensors", tensors, header)
    return sampled(lab, room, "other.safetensors").unlike(7, name)


def no_model(lab: Lab, room: Path) -> str:
    """A model that is not there."""
    return sampled(lab, room, "none.safetensors").unlike(7, "none.safetensors")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _canary(lab: Lab, room: Path, name: str) -> str:
    (room / name).write_bytes(pickle.dumps({"weight": _Canary(room / "canary")}))
    problem = sampled(lab, room, name).unlike(7)
    return "the file ran code" if (room / "canary").exists() else problem


def a_pickle(lab: Lab, room: Path) -> str:
    """A pickle that would run code."""
    return _canary(lab, room, "model.pt")


def a_pickle_with_the_right_name(lab: Lab, room: Path) -> str:
    """A pickle that calls itself model.safetensors."""
    return _canary(lab, room, "model.safetensors")


def _made(lab: Lab, room: Path, head: bytes, length: int | None = None, data: bytes = bytes(64)) -> str:
    """A file with this header is refused quickly, and without much memory."""
    (room / "made.safetensors").write_bytes(struct.pack("<Q", len(head) if length is None else length) + head + data)
    outcome = sampled(lab, room, "made.safetensors")
    if outcome.memory > 2**28:
        return f"took {outcome.memory / 2**20:.0f} MiB"
    return outcome.unlike(7)


def huge_header(lab: Lab, room: Path) -> str:
    """A header of 2^63 bytes."""
    return _made(lab, room, b"{}", 2**63)


def overlapping(lab: Lab, room: Path) -> str:
    """Two tensors in the same place."""
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    return _made(lab, room, json.dumps({"a": entry, "b": entry}).encode())


def twice(lab: Lab, room: Path) -> str:
    """A name that stands in the header twice."""
    entry = b'"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
    return _made(lab, room, b"{" + entry + b"," + entry + b"}")


def deep(lab: Lab, room: Path) -> str:
    """A header nested 100,000 deep."""
    return _made(lab, room, b"[" * 100_000)


def nan_weights(lab: Lab, room: Path) -> str:
    """A model with weights that are not finite."""
    from diffkit.engine.modelfile import read_tensors, write_tensors

    tensors, header = read_tensors(lab.run / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel())
    tensors[name].view(-1)[0] = float("nan")
    write_tensors(room / "nan.safetensors", tensors, header)
    return sampled(lab, room, "nan.safetensors").unlike({6, 7}, name)


def a_text(lab: Lab, room: Path) -> str:
    """A web page instead of a model."""
    (room / "model.safetensors").write_text("<!doctype html><title>404 Not Found</title>" * 100)
    return sampled(lab, room, "model.safetensors").unlike(7)


def a_folder(lab: Lab, room: Path) -> str:
    """A folder that is called model.safetensors."""
    (room / "model.safetensors").mkdir()
    return sampled(lab, room, "model.safetensors").unlike({2, 7})
