"""Two writers at once, folders that may not be written, and the modes of new files."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from diffkit.selftest.actions import ACTIONS, content
from diffkit.selftest.bench import Bench, Trial, Untestable, row
from diffkit.selftest.lab import Lab
from diffkit.selftest.rows.files import Unprivileged
from diffkit.selftest.rows.training import BARE


@row(17, "two trainings of one run at once")
def locked(bench: Bench) -> Iterator[Trial]:
    if os.name == "nt":
        raise Untestable("no flock on Windows")
    return bench.cases(second_training, sampled_meanwhile, without_its_lock_file)


@row(18, "folders that may not be written, and the modes of new files")
def permissions(bench: Bench) -> Iterator[Trial]:
    if os.name == "nt":
        raise Untestable("Windows has no modes")
    return bench.cases(read_only_run, read_only_parent, usual_modes, private_modes)


def second_training(lab: Lab, room: Path) -> str:
    """A second training of a run ends with 5 and names the first; then the way is free."""
    from diffkit.rundir import RunDir

    shutil.copytree(lab.run, room / "run")
    with RunDir(room / "run").locked():
        outcome = lab.diffkit(*ACTIONS["resume"].words(lab), here=room)
        if problem := outcome.unlike(5, str(os.getpid())):
            return problem
    return lab.diffkit(*ACTIONS["resume"].words(lab), here=room).unlike(0)


def sampled_meanwhile(lab: Lab, room: Path) -> str:
    """Sampling from a run that is being trained works."""
    from diffkit.rundir import RunDir

    shutil.copytree(lab.run, room / "run")
    with RunDir(room / "run").locked():
        words = ("sample", "run", "-o", "out", "-n", "1", "--steps", "1", "--device", "cpu")
        return lab.diffkit(*words, here=room).unlike(0)


def without_its_lock_file(lab: Lab, room: Path) -> str:
    """A lock whose file was deleted still keeps others away, or the first ends; never both write."""
    shutil.copytree(lab.run, room / "run")
    (room / "run" / "run.lock").unlink(missing_ok=True)
    return lab.diffkit(*ACTIONS["resume"].words(lab), here=room).unlike(0)


def read_only_run(lab: Lab, room: Path) -> str:
    """A run that may not be written is refused before the first step."""
    shutil.copytree(lab.run, room / "run")
    for path in (room / "run", *(room / "run").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = content(room / "run")
    outcome = lab.diffkit(*ACTIONS["resume"].words(lab), here=room, setup=[Unprivileged()])
    return outcome.unlike(4, "run") or ("" if content(room / "run") == before else "it has been changed")


def read_only_parent(lab: Lab, room: Path) -> str:
    """A place that may not be written is refused before the first step."""
    (room / "place").mkdir(mode=0o555)
    words = ("train", lab.data, "-o", "place/run", "--steps", "1", *BARE)
    return lab.diffkit(*words, here=room, setup=[Unprivileged()]).unlike(4, "place")


class Umask:
    """Set the mask of new files."""

    def __init__(self, mask: int) -> None:
        self.mask = mask

    def __call__(self) -> None:
        os.umask(self.mask)


def _modes(lab: Lab, room: Path, mask: int) -> str:
    for name in ("prepare", "train", "sample"):
        if problem := lab.diffkit(*ACTIONS[name].words(lab), here=room, setup=[Umask(mask)]).unlike(0):
            return problem
    for path in room.rglob("*"):
        mode, expected = stat.S_IMODE(path.stat().st_mode), (0o777 if path.is_dir() else 0o666) & ~mask
        if mode != expected:
            return f"{path.relative_to(room)} has the mode {mode:o} instead of {expected:o}"
    return ""


def usual_modes(lab: Lab, room: Path) -> str:
    """With the mask 022, others can read all that is written."""
    return _modes(lab, room, 0o022)


def private_modes(lab: Lab, room: Path) -> str:
    """With the mask 077, nobody else can."""
    return _modes(lab, room, 0o077)
