"""Checkpoints, models and data sets that have been damaged or exchanged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffkit.errors import DiffkitError, ExitCode
from diffkit.selftest import damage
from diffkit.selftest.actions import ACTIONS, TINY, difference
from diffkit.selftest.bench import Bench, Trial, row
from diffkit.selftest.lab import Lab, Outcome

PARTS = ("checkpoint", "model", "set")
COMMANDS = 10
"""Every so many flips of each part, a command meets one; the others are read by what all commands read with."""


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

    def flips(part: str) -> tuple[str, str, int]:
        files = files_of(bench.lab, part)
        file = chance.choices(files, [path.stat().st_size for path in files])[0]
        return part, file.name, chance.randrange(8 * file.stat().st_size)

    for start in range(0, 10**6, 3 * COMMANDS):
        yield from bench.each(harmed, ((part, name, "flip", place) for part, name, place in map(flips, PARTS)))
        rest = (flips(PARTS[number % 3]) for number in range(start + 3, start + 3 * COMMANDS))
        yield from bench.each(misread, rest)


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


def sampled(lab: Lab, room: Path, model: str) -> Outcome:
    """An image from a model."""
    return lab.diffkit("sample", model, "-o", "out", "-n", "1", "--steps", "1", "--device", "cpu", here=room)


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
        problem = sampled(lab, room, "model.safetensors").unlike(7, "model.safetensors")
    else:
        shutil.copytree(lab.run, room / "run")
        _harm(newest(room / "run"), way, place)
        outcome = lab.diffkit(*ACTIONS["resume"].words(lab), here=room)
        problem = outcome.unlike(0, "older checkpoint") or difference(lab.folder / "expected" / "resume", room / "run")
    shutil.rmtree(room)
    return Trial(f"{name} of a {part}, {way} at {place}", problem)


def misread(lab: Lab, part: str, name: str, place: int) -> Trial:
    """A bit of a file is flipped, and the file read: it has to be found out."""
    from diffkit.engine.checkpoint import latest_checkpoint
    from diffkit.engine.modelfile import read_model
    from diffkit.engine.store import Store

    room = lab.room()
    if part == "set":
        shutil.copytree(lab.data, room / "read")
        file = room / "read" / name
    else:
        source = newest(lab.run) if part == "checkpoint" else lab.run / "model.safetensors"
        file = room / "read" / source.parent.name / source.name
        file.parent.mkdir(parents=True)
        shutil.copy(source, file)
    damage.flip(file, place)
    try:
        if part == "checkpoint":
            latest_checkpoint(file.parents[1])
        elif part == "model":
            read_model(file)
        else:
            Store.open(file.parent)
        problem = "nothing was noticed"
    except DiffkitError as error:
        problem = "" if error.code in {ExitCode.DATA, ExitCode.MODEL} else f"exit code {error.code}: {error}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(room)
    return Trial(f"{name} of a {part}, read with bit {place} flipped", problem)


def _harm(file: Path, way: str, place: int) -> None:
    if way == "flip":
        damage.flip(file, place)
    else:
        file.write_bytes(file.read_bytes()[:place])


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
