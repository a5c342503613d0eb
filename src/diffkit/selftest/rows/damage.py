"""Checkpoints, models and data sets that have been damaged, exchanged, or made by someone else."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffkit.selftest import damage
from diffkit.selftest.actions import ACTIONS, TINY, difference
from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab, Outcome

PARTS = ("checkpoint", "model", "set")


@row(6, "a checkpoint, model or data set that is truncated")
def truncated(bench: Bench) -> Iterator[Trial]:
    found = [
        (part, file.name, "cut", length)
        for part in PARTS
        for file in files_of(bench.lab, part)
        for length in damage.lengths(file.stat().st_size)
        if file.stat().st_size
    ]
    random.Random(6).shuffle(found)
    return bench.each(harmed, found)


@row(7, "one flipped bit anywhere in a checkpoint, model or data set", full=6000)
def flipped(bench: Bench) -> Iterator[Trial]:
    chance = random.Random(7)

    def flips(part: str) -> tuple[str, str, str, int]:
        files = files_of(bench.lab, part)
        file = chance.choices(files, [path.stat().st_size for path in files])[0]
        return part, file.name, "flip", chance.randrange(8 * file.stat().st_size)

    return bench.each(harmed, (flips(PARTS[number % 3]) for number in range(10**6)))


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


@row(30, "a data set changed, moved or damaged between two starts")
def changed_data(bench: Bench) -> Iterator[Trial]:
    return bench.cases(other_images, missing_shard, moved_along, newer_data, statistics_changed)


def files_of(lab: Lab, part: str) -> list[Path]:
    """The files that make up a part of what was written."""
    if part == "set":
        return sorted(path for path in lab.data.iterdir() if path.stat().st_size)
    return [lab.run / "model.safetensors" if part == "model" else newest(lab.run)]


def newest(run: Path) -> Path:
    """The file of a run's last checkpoint."""
    return sorted(run.glob("checkpoints/*/state.safetensors"))[-1]


def harmed(lab: Lab, part: str, name: str, way: str, place: int) -> Trial:
    """A file is flipped or cut at a place, and then used: it has to be found out."""
    room = lab.room()
    if part == "set":
        shutil.copytree(lab.data, room / "set")
        _harm(room / "set" / name, way, place)
        problem = lab.diffkit("train", "set", "-o", "run", "--steps", "1", *TINY, here=room).unlike(3)
    elif part == "model":
        shutil.copy(lab.run / "model.safetensors", room)
        _harm(room / "model.safetensors", way, place)
        problem = _sampled(lab, room, "model.safetensors").unlike(7, "model.safetensors")
    else:
        shutil.copytree(lab.run, room / "run")
        _harm(newest(room / "run"), way, place)
        outcome = lab.diffkit(*ACTIONS["resume"].words(lab), here=room)
        problem = outcome.unlike(0, "older checkpoint") or difference(lab.folder / "expected" / "resume", room / "run")
    shutil.rmtree(room)
    return Trial(f"{name} of a {part}, {way} at {place}", problem)


def _harm(file: Path, way: str, place: int) -> None:
    if way == "flip":
        damage.flip(file, place)
    else:
        file.write_bytes(file.read_bytes()[:place])


def _sampled(lab: Lab, room: Path, model: str) -> Outcome:
    return lab.diffkit("sample", model, "-o", "out", "-n", "1", "--steps", "1", "--device", "cpu", here=room)


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
    return _sampled(lab, room, "new.safetensors").unlike(7, "format 99", "upgrade")


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
    return _sampled(lab, room, "other.safetensors").unlike(7, name)


def no_model(lab: Lab, room: Path) -> str:
    """A model that is not there."""
    return _sampled(lab, room, "none.safetensors").unlike(7, "none.safetensors")


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def _canary(lab: Lab, room: Path, name: str) -> str:
    (room / name).write_bytes(pickle.dumps({"weight": _Canary(room / "canary")}))
    problem = _sampled(lab, room, name).unlike(7)
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
    outcome = _sampled(lab, room, "made.safetensors")
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
    return _sampled(lab, room, "nan.safetensors").unlike({6, 7}, name)


def a_text(lab: Lab, room: Path) -> str:
    """A web page instead of a model."""
    (room / "model.safetensors").write_text("<!doctype html><title>404 Not Found</title>" * 100)
    return _sampled(lab, room, "model.safetensors").unlike(7)


def a_folder(lab: Lab, room: Path) -> str:
    """A folder that is called model.safetensors."""
    (room / "model.safetensors").mkdir()
    return _sampled(lab, room, "model.safetensors").unlike({2, 7})


def _prepared(lab: Lab, room: Path, name: str, *options: str) -> None:
    outcome = lab.diffkit("prepare", lab.images, "-o", name, "--size", "12", *options, here=room)
    if outcome.code:
        raise RuntimeError(outcome.output)


def _continued(lab: Lab, room: Path, data: str, code: int, *texts: str) -> str:
    words = ACTIONS["resume"].words(lab)
    words[words.index(str(lab.data))] = data
    return lab.diffkit(*words, here=room).unlike(code, *texts)


def other_images(lab: Lab, room: Path) -> str:
    """Another data set is not trained on by the same run."""
    shutil.copytree(lab.run, room / "run")
    _prepared(lab, room, "other", "--crop", "random", "--holdout", "30%")
    return _continued(lab, room, "other", 3)


def missing_shard(lab: Lab, room: Path) -> str:
    """A shard that is gone is named."""
    shutil.copytree(lab.data, room / "set")
    (room / "set" / "images-00000.npy").unlink()
    return lab.diffkit("train", "set", "-o", "run", "--steps", "1", *TINY, here=room).unlike(3, "images-00000.npy")


def moved_along(lab: Lab, room: Path) -> str:
    """The same data set in another place is the same."""
    shutil.copytree(lab.run, room / "run")
    shutil.copytree(lab.data, room / "moved")
    return _continued(lab, room, "moved", 0)


def newer_data(lab: Lab, room: Path) -> str:
    """A data set of a newer format is named as such."""
    shutil.copytree(lab.data, room / "set")
    index = room / "set" / "dataset.json"
    value = json.loads(index.read_text())
    index.write_text(json.dumps({**value, "version": 99}))
    return lab.diffkit("train", "set", "-o", "run", "--steps", "1", *TINY, here=room).unlike(3, "99")


def statistics_changed(lab: Lab, room: Path) -> str:
    """A mean that was edited by hand is found out."""
    shutil.copytree(lab.data, room / "set")
    index = room / "set" / "dataset.json"
    value = json.loads(index.read_text())
    index.write_text(json.dumps({**value, "mean": [0.0] * len(value["mean"])}, indent=2) + "\n")
    return lab.diffkit("train", "set", "-o", "run", "--steps", "1", *TINY, here=room).unlike(3)
