"""The run directory: begun once, written by one process, never begun anew over something trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import TINY, call_diffkit, write_images
from diffkit import durable
from diffkit.compose.due import missed
from diffkit.engine.checkpoint import latest_checkpoint
from diffkit.engine.modelfile import read_model
from diffkit.engine.session import Cadence
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

ONCE = ("--steps", 8, "--precision", "float32", "--preview-every", 0, *TINY)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the shared run of six steps."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "run.lock").unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    "gone",
    [
        ["checkpoints"],
        ["checkpoints/*"],
        ["checkpoints", "model.safetensors", "best.safetensors"],
        ["checkpoints", "metrics.jsonl", "sessions.jsonl"],
        ["checkpoints", "model.safetensors", "best.safetensors", "metrics.jsonl", "samples"],
    ],
)
def test_a_trained_run_without_checkpoints_is_never_begun_anew(dataset: Path, copied: Path, gone: list[str]) -> None:
    for pattern in gone:
        for path in list(copied.glob(pattern)):
            durable.remove(path)
    before = contents(copied)
    done = call_diffkit("train", dataset, "-o", copied, *ONCE)
    assert done.returncode == ExitCode.MODEL
    assert "has no checkpoint to go on from" in done.stderr and "--init" in done.stderr
    (copied / "run.lock").unlink()
    assert contents(copied) == before


def test_a_run_without_its_config_is_not_taken_for_a_new_one(dataset: Path, copied: Path) -> None:
    (copied / "config.toml").unlink()
    before = contents(copied)
    done = call_diffkit("train", dataset, "-o", copied, *ONCE)
    assert done.returncode == ExitCode.MODEL and "without its config.toml" in done.stderr
    assert contents(copied) == before


def test_a_config_that_was_changed_is_refused(dataset: Path, copied: Path) -> None:
    config = (copied / "config.toml").read_text()
    (copied / "config.toml").write_text(config.replace("warmup_images = 10000", "warmup_images = 10008"))
    done = call_diffkit("train", dataset, "-o", copied, *ONCE)
    assert done.returncode == ExitCode.MODEL and "not what it was when the checkpoint was written" in done.stderr
    assert "train.warmup_images = 10008 (was 10000)." in done.stderr
    (copied / "config.toml").write_text(config)
    assert call_diffkit("train", dataset, "-o", copied, *ONCE).returncode == 0


def test_a_start_that_was_killed_before_the_run_had_begun_is_done_again(dataset: Path, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    stray = durable.temporary_name(run / "config.toml")
    (run / stray.name.replace(f"-{os.getpid()}-", f"-{gone.pid}-")).write_text("half a con")
    done = call_diffkit("train", dataset, "-o", run, "--steps", 1, *TINY)
    assert done.returncode == 0, done.stderr
    assert not [name for name in os.listdir(run) if name.startswith(".")]


def test_a_run_that_was_killed_between_its_config_and_its_first_checkpoint_goes_on(
    dataset: Path, copied: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(copied / "config.toml", again)
    done = call_diffkit("train", dataset, "-o", again, *ONCE)
    assert done.returncode == 0, done.stderr
    assert call_diffkit("train", dataset, "-o", copied, *ONCE).returncode == 0
    states = [path / "checkpoints" / "images-000000000064" / "state.safetensors" for path in (again, copied)]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_run_has_a_checkpoint_from_its_beginning(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.compose.training import Training

    def killed(self: Training, *arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "start", killed)
    assert call_diffkit("train", dataset, "-o", tmp_path / "run", *ONCE).returncode == ExitCode.INTERRUPTED
    checkpoint, problems = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and (checkpoint.images_seen, problems) == (0, {})


def test_files_of_other_programs_in_a_run_stay(dataset: Path, copied: Path) -> None:
    names = [".notes.tmp", ".model.safetensors.12345.tmp", ".checkpoints.tmp"]
    for name in names:
        (copied / name).write_text("not ours")
    assert call_diffkit("train", dataset, "-o", copied, *ONCE).returncode == 0
    assert all((copied / name).read_text() == "not ours" for name in names)


HOLD = """
import sys, time
from pathlib import Path
from diffkit.rundir import RunDir
with RunDir(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_writes_a_run_even_if_run_lock_is_deleted(dataset: Path, copied: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(copied)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        done = call_diffkit("train", dataset, "-o", copied, *ONCE)
        assert done.returncode == ExitCode.LOCKED and f"process {holder.pid}" in done.stderr
        (copied / "run.lock").unlink()
        assert call_diffkit("train", dataset, "-o", copied, *ONCE).returncode == ExitCode.LOCKED
    finally:
        holder.kill()
        holder.communicate()
    assert call_diffkit("train", dataset, "-o", copied, *ONCE).returncode == 0


def test_a_start_that_fails_leaves_no_folder(dataset: Path, tmp_path: Path) -> None:
    wrong = ("--scheduler", "no-such-schedule")
    assert call_diffkit("train", dataset, "-o", tmp_path / "a" / "run", *ONCE, *wrong).returncode == ExitCode.USAGE
    assert not (tmp_path / "a" / "run").exists()
    (tmp_path / "empty").mkdir()
    assert call_diffkit("train", dataset, "-o", tmp_path / "empty", *ONCE, *wrong).returncode == ExitCode.USAGE
    assert list((tmp_path / "empty").iterdir()) == []


def test_too_small_a_disk_is_named_before_the_first_step(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**20, 0, 2**20))
    run = tmp_path / "run"
    done = call_diffkit("train", dataset, "-o", run, *ONCE)
    assert done.returncode == ExitCode.MACHINE
    assert "Disk full: need" in done.stderr and f"have 1 MiB at {run}" in done.stderr
    assert not (run / "config.toml").exists() and (run / "metrics.jsonl").read_bytes() == b""
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "metrics.jsonl", "samples"]
    monkeypatch.undo()
    assert call_diffkit("train", dataset, "-o", run, *ONCE).returncode == 0


def test_snapshots_count_in_what_a_training_needs(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[int] = []

    def disk_full(path: Path, need: int) -> DiffkitError:
        needs.append(need)
        return DiffkitError("Disk full.", code=ExitCode.MACHINE)

    monkeypatch.setattr(durable, "free_space", lambda path: 0)
    monkeypatch.setattr(durable, "disk_full", disk_full)
    for snapshots in (4, 10):
        more = ("--ema-snapshots", snapshots, "--set", "train.ema_lengths=[0.05,0.1]")
        assert call_diffkit("train", dataset, "-o", tmp_path / "run", *ONCE, *more).returncode == ExitCode.MACHINE
    monkeypatch.undo()
    assert call_diffkit("train", dataset, "-o", tmp_path / "run", *ONCE).returncode == 0
    tensors, _ = read_model(tmp_path / "run" / "model.safetensors")
    assert needs[1] - needs[0] == 6 * 2 * sum(tensor.nbytes for tensor in tensors.values())


def test_processes_decide_together_what_was_missed(tmp_path: Path) -> None:
    """A process that finds all that is due on its disk takes part where another one does not."""
    run = RunDir(tmp_path)
    run.lay_out()
    run.add_metrics({"images": 16, "picture": "samples/a.png"})
    cadence = Cadence(16, preview_every=8)

    def found(agreed: Callable[[bool], bool]) -> list[str]:
        world, state, recipe = (
            SimpleNamespace(any=agreed),
            SimpleNamespace(images_seen=16),
            SimpleNamespace(batch_size=8),
        )
        training: Any = SimpleNamespace(run=run, world=world, state=state, recipe=recipe)
        return missed(training, cadence, [])

    assert found(lambda flag: flag) == []
    assert found(lambda flag: True) == ["preview"]


def test_a_run_finds_its_data_wherever_both_are(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    write_images(old / "images", {"high": 12, "low": 12})
    assert call_diffkit("prepare", old / "images", "-o", old / "set", "--size", 12, "--holdout", 0).returncode == 0
    once = ("--steps", 1, "--preview-every", 0, *TINY)
    assert call_diffkit("train", "set", "-o", "runs/run", *once, cwd=old).returncode == 0
    measured = ("-n", 20, "--steps", 1, "--json", "--device", "cpu")

    def where(run: Path, cwd: Path) -> str:
        done = call_diffkit("evaluate", run, *measured, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["reference"]["path"])

    assert where(old / "runs" / "run", tmp_path) == str(old / "set")
    old.rename(new)
    assert where(new / "runs" / "run", tmp_path) == str(new / "set")
    write_images(tmp_path / "others", {"high": 3, "low": 20})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    prepared = call_diffkit("prepare", tmp_path / "others", "-o", elsewhere / "set", "--size", 12, "--holdout", 0)
    assert prepared.returncode == 0
    assert where(new / "runs" / "run", elsewhere) == str(new / "set")
    (new / "set").rename(tmp_path / "away")
    done = call_diffkit("evaluate", new / "runs" / "run", *measured, cwd=elsewhere)
    assert done.returncode == ExitCode.DATA
    assert f"{elsewhere / 'set'} holds other data" in done.stderr and "--data" in done.stderr
    done = call_diffkit("evaluate", new / "runs" / "run", *measured, "--data", elsewhere / "set", cwd=elsewhere)
    assert done.returncode == 0
    assert "is not the data set that the model was trained on" in " ".join(json.loads(done.stdout)["notes"])
