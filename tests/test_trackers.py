"""Trackers: each read back through its own library, and none of them able to harm a training."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, call_diffkit, run_diffkit
from diffkit.compose import tracking
from diffkit.compose.tracking import Dropped, Trackers, told
from diffkit.config import Settings
from diffkit.durable import read_lines
from diffkit.engine.appearance import Appearance
from diffkit.engine.session import Ended, Previewed
from diffkit.engine.train import Progress
from diffkit.engine.validate import Validated
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Log, TrackedRun
from diffkit.rundir import RunDir
from diffkit.testing import check_tracker

LOSSES = {100: 0.5, 200: 0.25}


@pytest.fixture
def tracked(tmp_path: Path) -> TrackedRun:
    (tmp_path / "run" / "samples").mkdir(parents=True)
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = (200, 30, 60)
    Image.fromarray(pixels).save(tmp_path / "run" / "samples" / "a.png")
    return TrackedRun(tmp_path / "run", "roses", {"train": {"lr": 0.001}}, "0123456789abcdef")


def feed(log: Log, run: TrackedRun) -> None:
    for images, loss in LOSSES.items():
        log(images, {"train/loss": loss}, {})
    log(200, {}, {"samples": run.path / "samples" / "a.png"})


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format that is shorter than a block: checksum, length, type 1 = whole."""
    place = 0
    while place + 7 <= len(log):
        _, length, kind = struct.unpack_from("<IHB", log, place)
        assert kind == 1
        yield log[place + 7 : place + 7 + length]
        place += 7 + length


def wandb_losses(file: Path) -> dict[int, float]:
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {each.nested_key[0]: json.loads(each.value_json) for each in record.history.item}
        if "train/loss" in items:
            found[items["images"]] = items["train/loss"]
    return found


def test_tensorboard_has_the_figures_and_the_picture(tracked: TrackedRun) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from diffkit.trackers.tensorboard import tensorboard

    with tensorboard(tracked) as log:
        feed(log, tracked)
    events = EventAccumulator(str(tracked.path / "tensorboard")).Reload()
    assert {each.step: each.value for each in events.Scalars("train/loss")} == LOSSES
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (200, 8, 8)


def test_wandb_offline_has_the_figures(tracked: TrackedRun) -> None:
    pytest.importorskip("wandb")
    from diffkit.trackers.wandb import wandb

    with wandb(tracked, mode="offline") as log:
        feed(log, tracked)
    (file,) = tracked.path.rglob("*.wandb")
    deadline = time.monotonic() + 30
    while (found := wandb_losses(file)) != LOSSES and time.monotonic() < deadline:
        time.sleep(0.2)  # its own process writes the file
    assert found == LOSSES
    assert list(tracked.path.rglob("*.png"))


def test_mlflow_has_the_figures_and_goes_on_with_the_same_run(
    tracked: TrackedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    from diffkit.trackers.mlflow import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for loss in (0.5, 0.25):
        with mlflow(tracked) as log:
            log(round(50 / loss), {"train/loss": loss}, {"samples": tracked.path / "samples" / "a.png"})
    client = MlflowClient(tracking_uri=(tracked.path / "mlruns").resolve().as_uri())
    experiment = client.get_experiment_by_name("diffkit")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {each.step: each.value for each in history} == LOSSES
    assert run.data.params["train.lr"] == "0.001"
    assert run.info.status == "FINISHED"
    assert [each.path for each in client.list_artifacts(run.info.run_id, "samples")] == ["samples/a.png"]


def test_trackio_has_the_figures(tracked: TrackedRun, tmp_path: Path) -> None:
    """In a process of its own: its folder is chosen when it is imported."""
    pytest.importorskip("trackio")
    import subprocess
    import sys

    code = f"""
import json
from pathlib import Path
from diffkit.interfaces import TrackedRun
from diffkit.trackers.trackio import trackio
run = TrackedRun(Path({str(tracked.path)!r}), "roses", {{"lr": 0.001}}, "0123456789abcdef")
with trackio(run, project="test") as log:
    for images, loss in {LOSSES!r}.items():
        log(images, {{"train/loss": loss}}, {{}})
    log(200, {{}}, {{"samples": run.path / "samples" / "a.png"}})
from trackio.sqlite_storage import SQLiteStorage
found = SQLiteStorage.get_logs("test", "roses-012345")
print(json.dumps({{each["step"]: each["train/loss"] for each in found if "train/loss" in each}}))
"""
    environment = {"PATH": "/usr/bin", "TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    environment |= {"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("{"))
    found = json.loads(line)
    assert found == {str(images): loss for images, loss in LOSSES.items()}


def test_a_training_is_told_to_two_trackers_at_once_and_resumes_them(dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    for steps in (3, 6):
        options = ("--steps", steps, "--validate-every", 16, "--preview-every", 24, *TINY)
        done = run_diffkit("train", dataset, "-o", run, *options, "--track", "tensorboard", "--track", "mlflow")
        assert done.returncode == 0, done.stderr
    losses = {record["images"]: record["loss"] for record in read_lines(run / "metrics.jsonl") if "loss" in record}
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    shown = {each.step: each.value for each in events.Scalars("train/loss")}
    assert shown
    assert min(losses.values()) * 0.99 <= min(shown.values())
    assert max(shown.values()) <= max(losses.values()) * 1.01
    held = {r["images"]: r["holdout_loss"] for r in read_lines(run / "metrics.jsonl") if "holdout_loss" in r}
    assert {e.step: e.value for e in events.Scalars("holdout/loss")} == pytest.approx(held, rel=1e-5)
    assert events.Images("samples")
    client = MlflowClient(tracking_uri=(run / "mlruns").resolve().as_uri())
    (only,) = client.search_runs([client.get_experiment_by_name("diffkit").experiment_id])  # type: ignore[union-attr]
    assert only.data.metrics["holdout/loss"] == pytest.approx(held[48], rel=1e-5)
    assert [record["track"] for record in read_lines(run / "sessions.jsonl")] == [["tensorboard", "mlflow"]] * 2


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    heard: list[int] = []

    @contextmanager
    def broken(run: TrackedRun) -> Iterator[Log]:
        def log(images: int, figures: object, pictures: object) -> None:
            raise ConnectionError("the server is gone")

        yield log

    @contextmanager
    def sound(run: TrackedRun) -> Iterator[Log]:
        yield lambda images, figures, pictures: heard.append(images)

    trackers = Trackers([], RunDir(tmp_path), Settings())
    validated = [Validated(images, (1.0,), (0.5,), (0.4,)) for images in (1, 2, 3)]
    trackers.chosen = [(Settings().scheduler.model_copy(update={"name": f.__name__}), f) for f in (broken, sound)]
    with trackers:
        dropped = [each for event in validated for each in trackers.tell(event)]
    assert dropped == [Dropped("broken", "ConnectionError: the server is gone")]
    assert heard == [1, 2, 3]


@pytest.mark.parametrize("where", ["log", "exit"])
@pytest.mark.parametrize("way", ["sys.exit(0)", "a keyboard interrupt", "an error it may raise itself", "a hang"])
def test_whatever_a_tracker_does_costs_only_itself(
    way: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    released = threading.Event()

    def misbehave() -> None:
        if way == "a hang":
            released.wait()
        raise {"sys.exit(0)": SystemExit(0), "a keyboard interrupt": KeyboardInterrupt()}.get(way) or DiffkitError("no")

    @contextmanager
    def ill(run: TrackedRun) -> Iterator[Log]:
        yield lambda images, figures, pictures: misbehave() if where == "log" else None
        misbehave()

    @contextmanager
    def sound(run: TrackedRun) -> Iterator[Log]:
        yield lambda images, figures, pictures: heard.append(images)

    monkeypatch.setattr(tracking, "PATIENCE", 0.2)
    trackers = Trackers([], RunDir(tmp_path), Settings())
    trackers.chosen = [(Settings().scheduler.model_copy(update={"name": f.__name__}), f) for f in (ill, sound)]
    begun = time.monotonic()
    with trackers:
        dropped = [each for images in (1, 2) for each in trackers.tell(Validated(images, (1.0,), (0.5,), (0.4,)))]
        assert len(dropped) == (where == "log")
        dropped += trackers.finish()
    assert time.monotonic() - begun < 5
    (only,) = dropped
    reasons = {"sys.exit(0)": "SystemExit: 0", "a keyboard interrupt": "KeyboardInterrupt", "a hang": "no answer"}
    assert only.tracker == "ill" and reasons.get(way, "DiffkitError: no") in only.reason
    assert heard == [1, 2]
    released.set()


def test_a_tracker_that_ends_the_process_at_its_start_does_not_start(tmp_path: Path) -> None:
    @contextmanager
    def ill(run: TrackedRun) -> Iterator[Log]:
        raise SystemExit(0)
        yield

    trackers = Trackers([], RunDir(tmp_path), Settings())
    trackers.chosen = [(Settings().scheduler.model_copy(update={"name": "ill"}), ill)]
    with pytest.raises(DiffkitError, match="The tracker 'ill' does not start: SystemExit: 0"), trackers:
        pass


def test_steps_are_told_in_averages_and_the_last_of_them_at_the_end(tmp_path: Path) -> None:
    heard: list[tuple[int, float]] = []

    @contextmanager
    def sound(run: TrackedRun) -> Iterator[Log]:
        yield lambda images, figures, pictures: heard.append((images, figures["train/loss"]))

    trackers = Trackers([], RunDir(tmp_path), Settings())
    trackers.chosen = [(Settings().scheduler.model_copy(update={"name": "sound"}), sound)]
    steps = [Progress(images, images, 1e-3, loss=images, grad_norm=1.5, images_per_second=100.0) for images in (8, 16)]
    with trackers:
        assert [each for event in (*steps, Ended(16, "done")) for each in trackers.tell(event)] == []
    assert heard == [(16, 12.0)]


def test_events_become_figures_and_pictures(tmp_path: Path) -> None:
    step = Progress(64, 2, 1e-3, loss=0.5, grad_norm=1.5, images_per_second=100.0, data_wait=0.1)
    assert told(step)[0]["train/loss"] == 0.5
    assert told(Progress(64, 2, 1e-3)) == ({}, {})
    figures, _ = told(Validated(64, (0.5, 2.0), (0.4, 0.6), (0.2, 0.3)))
    assert figures["holdout/loss"] == pytest.approx(0.5)
    assert figures["holdout/gap"] == pytest.approx(1.0)
    assert figures["holdout/loss_at_s_2"] == 0.6
    assert told(Previewed(64, tmp_path / "a.png", Appearance((0.1,), (0.2,), 0.2, 0.0))) == (
        {"colour/mean_0": 0.1},
        {"samples": tmp_path / "a.png"},
    )


def test_a_tracker_that_there_is_not_is_refused_before_the_run_begins(dataset: Path, tmp_path: Path) -> None:
    for name, words in (("tensorbord", "Did you mean 'tensorboard'?"), ("wandb:projekt=x", "no option 'projekt'")):
        done = call_diffkit("train", dataset, "-o", tmp_path / "run", "--steps", 1, "--track", name, *TINY)
        assert done.returncode == ExitCode.USAGE
        assert words in done.stderr
        assert not (tmp_path / "run" / "config.toml").exists()


def test_a_missing_library_says_how_to_install_it(tracked: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from diffkit.trackers.trackio import trackio

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(DiffkitError, match=r"pip install 'diffkit\[trackio\]'"), trackio(tracked):
        pass


def test_built_in_trackers_keep_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from diffkit.trackers.tensorboard import tensorboard

    check_tracker(tensorboard)

    @contextmanager
    def forgetful(run: TrackedRun) -> Iterator[None]:
        yield None

    with pytest.raises(AssertionError, match="a function log"):
        check_tracker(forgetful)  # type: ignore[arg-type]
