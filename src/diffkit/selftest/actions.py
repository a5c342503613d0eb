"""The commands that write, how each is tried again after a fault, and what has to be there afterwards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffkit.durable import read_lines
from diffkit.selftest.lab import Lab, Outcome

NETWORK = "unet:width=8,multipliers=[1],blocks=1,attention=0"
TINY = ("--backbone", NETWORK, "--batch-size", "8", "--precision", "float32", "--device", "cpu")
WHILE = ("--save-every", "0s", "--preview-every", "24", "--validate-every", "24", "--ema-snapshots", "3")
TIMINGS = ("images_per_second", "data_wait")


@dataclass(frozen=True)
class Action:
    """A command that writes `target`; `from_run`: begun on a copy of the lab's run, which lies at `target`."""

    name: str
    command: tuple[str, ...]
    target: str
    from_run: bool = False

    def words(self, lab: Lab) -> list[str]:
        """The command, with the lab's places in it."""
        places = {"IMAGES": lab.images, "SET": lab.data, "RUN": lab.run}
        return [str(places.get(word, word)) for word in self.command]

    def begin(self, lab: Lab) -> Path:
        """A room in which the command can be run."""
        room = lab.room()
        if self.from_run:
            shutil.copytree(lab.run, room / self.target)
        return room

    def recover(self, lab: Lab, room: Path, standing: int | None = None) -> str:
        """After a fault: what was finished must be right, and the same command must bring all of it, from the
        checkpoint at `standing` images or a later one. What is wrong, or an empty string."""
        target, expected = room / self.target, lab.folder / "expected" / self.name
        if self.name == "prepare" and target.exists():
            return difference(expected, target)
        words = self.words(lab)
        if self.name == "sample" and target.exists():  # a folder with images in it is left alone
            if damaged := _unlike(expected, target):
                return f"{damaged} is not what was sampled"
            target = room / "again"
            words[words.index("-o") + 1] = "again"
        standing = newest_checkpoint(target) if standing is None else standing
        outcome = lab.diffkit(*words, here=room)
        if outcome.code:
            return f"the same command again ends with {outcome.code}: {outcome.last_lines()}"
        if self.command[0] == "train" and (begun := begun_from(outcome)) < standing < newest_checkpoint(target):
            return f"went on from {begun} images, though there was a checkpoint at {standing}"
        return difference(expected, target) or leftovers(target if self.name == "sample" else room)


ACTIONS = {
    action.name: action
    for action in (
        Action("prepare", ("prepare", "IMAGES", "-o", "set", "--size", "12", "--holdout", "10%"), "set"),
        Action("train", ("train", "SET", "-o", "run", "--steps", "6", *TINY, *WHILE), "run"),
        Action("resume", ("train", "SET", "-o", "run", "--steps", "10", *TINY, *WHILE), "run", from_run=True),
        Action("sample", ("sample", "RUN", "-o", "samples", "-n", "6", "--steps", "3", "--device", "cpu"), "samples"),
        Action("ema", ("ema", "run", "--length", "0.1"), "run", from_run=True),
    )
}


def build(lab: Lab) -> None:
    """Make what trials start from, and the uninterrupted result of every action."""
    for name in ("reports", "rooms", "expected"):
        (lab.folder / name).mkdir(parents=True)
    write_images(lab.images)
    for name, place in (("prepare", lab.data), ("train", lab.run)):
        room = lab.room()
        _succeed(lab.diffkit(*ACTIONS[name].words(lab), here=room))
        shutil.move(room / ACTIONS[name].target, place)
    for action in ACTIONS.values():
        room = action.begin(lab)
        outcome = lab.diffkit(*action.words(lab), here=room)
        _succeed(outcome)
        shutil.move(room / action.target, lab.folder / "expected" / action.name)
        (lab.folder / f"{action.name}.seconds").write_text(str(outcome.seconds))


def write_images(folder: Path) -> None:
    """40 PNG files of noise around a colour of their own, in two classes."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for index in range(40):
        place = folder / f"class-{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.normal(random.uniform(40, 215, 3), 20, (12, 12, 3)).clip(0, 255).astype("uint8")
        Image.fromarray(pixels).save(place / f"{index:03}.png")


def content(folder: Path) -> dict[str, str]:
    """What a folder holds that a fault must not change: the hash of every file, without times and old checkpoints."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    checkpoints = [path.parent for path in files if path.parent.parent.name == "checkpoints"]
    found = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        old = path.parent in checkpoints and path.parent != checkpoints[-1]
        if not (old or path.name in ("sessions.jsonl", "run.lock") or ".tmp" in name or "damaged-" in name):
            found[name] = hashlib.sha256(_plain(path)).hexdigest()
    return found


def difference(expected: Path, found: Path) -> str:
    """The first file that is not the same in both, if there is one."""
    one, other = content(expected), content(found)
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            return f"{name} is {'missing' if name not in other else 'not expected' if name not in one else 'different'}"
    return ""


def newest_checkpoint(run: Path) -> int:
    """The images that its last checkpoint has seen; 0 if there is none."""
    return max((int(path.name.partition("-")[2]) for path in run.glob("checkpoints/images-*")), default=0)


def begun_from(outcome: Outcome) -> int:
    """The images that had been seen when this training began."""
    found = re.search(r"(?:going on from|already seen) ([\d,]+) images", outcome.output)
    return int(found[1].replace(",", "")) if found else 0


def leftovers(room: Path) -> str:
    """Whatever is half-written and was left lying about."""
    stray = sorted(path.name for path in room.rglob("*.tmp"))
    return f"left behind: {', '.join(stray)}" if stray else ""


def _unlike(expected: Path, found: Path) -> str:
    """The first image that is there but is another."""
    for path in found.rglob("*.png"):
        if (expected / path.relative_to(found)).read_bytes() != path.read_bytes():
            return path.name
    return ""


def _plain(path: Path) -> bytes:
    return "\n".join(_without_times(path)).encode() if path.name == "metrics.jsonl" else path.read_bytes()


def _without_times(path: Path) -> Iterator[str]:
    """The records as they are read: what a power cut has torn is passed over."""
    for record in read_lines(path):
        yield json.dumps({key: value for key, value in record.items() if key not in TIMINGS})


def _succeed(outcome: Outcome) -> None:
    if outcome.code:
        raise RuntimeError(f"without any fault, {outcome.bug or outcome.last_lines()}")
