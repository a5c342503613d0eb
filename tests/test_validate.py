"""The held-out loss, when it is measured, and the rules that stop a training by it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY, call_diffkit, run_diffkit, write_images
from diffkit.backbones.unet import UNet
from diffkit.compose.start import prepare_training
from diffkit.core.denoiser import Denoiser
from diffkit.core.predictions import x0
from diffkit.core.schedules import loglinear, over_range
from diffkit.durable import read_lines
from diffkit.engine.modelfile import read_model_header
from diffkit.engine.session import Cadence
from diffkit.engine.stopping import best, memorizing, plateau
from diffkit.engine.store import Store
from diffkit.engine.validate import Validated, Validation, due
from diffkit.errors import ExitCode
from diffkit.rundir import RunDir


class Gray(torch.nn.Module):
    """Estimates every clean image as zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        return torch.zeros_like(x)


def at(*points: tuple[int, float, float]) -> list[Validated]:
    return [Validated(images, (1.0,), (holdout,), (training,)) for images, holdout, training in points]


def test_the_loss_is_the_mean_squared_error_over_fixed_images(dataset: Path) -> None:
    """Predicting zero, with the x0 prediction, the loss at every level is the mean square of the images."""
    store = Store.open(dataset)
    validation = Validation(store, store.spec, over_range(loglinear, 0.01, 50.0, 1.0), seed=0)
    found = validation(Denoiser(Gray(), x0), 640)
    count = min(64, store.holdout_count, store.count)
    for part, total, losses in (
        ("holdout", store.holdout_count, found.holdout),
        ("train", store.count, found.training),
    ):
        chosen = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
        images = store.gather(chosen, part)[0] / 127.5 - 1
        assert losses == pytest.approx([np.square(images).mean()] * 8, rel=1e-4)
    assert found == validation(Denoiser(Gray(), x0), 640)
    steps = np.diff(np.log(found.levels))
    assert steps == pytest.approx([steps[0]] * 7)
    assert Validated.from_record(found.to_record()) == found


def test_validations_are_spaced_evenly_then_by_a_twentieth() -> None:
    points = [images for images in range(1, 400_001) if due(images - 1, images, 5_000)]
    assert points[:20] == list(range(5_000, 100_001, 5_000))
    growth = [later / earlier for earlier, later in itertools.pairwise(points[20:])]
    assert growth == pytest.approx([1.05] * len(growth), abs=1e-4)
    # Whatever the batch, the steps that reach a point are the ones that validate.
    for batch in (32, 1000, 7777):
        met = {seen for seen in range(0, 400_000 - batch, batch) if due(seen, seen + batch, 5_000)}
        assert met == {(point - 1) // batch * batch for point in points} & set(range(0, 400_000 - batch, batch))
    assert not due(0, 10**9, 0)


def test_memorizing_stops_after_the_turn_and_not_before() -> None:
    falling = at((10, 1.0, 1.0), (20, 0.8, 0.7), (30, 0.7, 0.5))
    assert not memorizing(falling)
    turned = [*falling, *at((31, 0.71, 0.45), (32, 0.72, 0.44))]
    assert not memorizing(turned)  # two validations after the best are too few
    assert not memorizing([*turned, *at((32, 0.73, 0.43))])  # and less than a tenth further on
    assert memorizing([*turned, *at((34, 0.73, 0.43))])
    assert not memorizing([*turned, *at((34, 0.73, 0.6))])  # diverging, not memorising
    assert not memorizing([*turned, *at((34, 0.7005, 0.43))])  # within the margin
    assert not memorizing([])


def test_plateau_stops_when_nothing_is_gained_any_more() -> None:
    curve = [(images, 0.3 + math.exp(-images / 100), 0.3) for images in range(50, 2001, 50)]
    stops = [images for number, (images, _, _) in enumerate(curve, 1) if plateau(at(*curve[:number]))]
    # From 0.7 t to t the loss falls by 0.5 %: exp(-0.7 t) - exp(-t) = 0.005 (0.3 + exp(-0.7 t)), at t = 9.2 (hundred).
    assert stops[0] == 950
    assert stops == list(range(stops[0], 2001, 50))
    assert not plateau(at(*curve[:4]))


def test_the_best_model_is_kept_with_the_history_over_a_resumption(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps in (6, 12):
        options = ("--steps", steps, "--validate-every", 8, "--preview-every", 0, *TINY)
        done = call_diffkit("train", dataset, "-o", run, *options)
        assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stderr
    history = [Validated.from_record(each) for each in read_lines(run / "metrics.jsonl") if "holdout_loss" in each]
    assert [each.images_seen for each in history] == list(range(8, 97, 8))
    lowest = best(history)
    assert lowest is not None
    assert read_model_header(run / "best.safetensors")["images_seen"] == lowest.images_seen
    made = call_diffkit("sample", run / "best.safetensors", "-o", tmp_path / "made", "-n", 2, "--steps", 1)
    assert made.returncode == 0, made.stderr


def test_the_best_model_can_be_the_nearest_to_the_training_images(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("diffkit.compose.looks.MEASURED_IMAGES", 24)
    run = tmp_path / "run"
    for steps in (4, 8):
        options = ("--steps", steps, "--best", "kid", "--preview-every", 16, "--set", "sample.steps=2", *TINY)
        done = call_diffkit("train", dataset, "-o", run, *options)
        assert done.returncode == 0, done.stderr
        assert "KD-lite0" in done.stderr
    records = read_lines(run / "evaluations.jsonl")
    assert [record["images_seen"] for record in records] == [16, 32, 48, 64]
    lowest = min(records, key=lambda record: record["metrics"][0]["value"])
    assert read_model_header(run / "best.safetensors")["images_seen"] == lowest["images_seen"]
    page = call_diffkit("report", run, "--no-trajectory")
    assert page.returncode == 0, page.stderr
    assert "KD-lite0" in (run / "report.html").read_text()
    for option, words in (("fid", "Choose holdout, kid"), ("kid", "Leave --preview-every 0 out")):
        done = call_diffkit("train", dataset, "-o", run, "--steps", 9, "--best", option, "--preview-every", 0, *TINY)
        assert done.returncode == ExitCode.USAGE
        assert words in done.stderr


@pytest.mark.slow
def test_a_training_on_few_images_is_stopped_when_it_begins_to_memorise(tmp_path: Path) -> None:
    """Noise images: little can be learnt of the held-out ones. The same command again trains no further."""
    write_images(tmp_path / "images", {"a": 40})
    generator = np.random.default_rng(0)
    from PIL import Image

    for file in (tmp_path / "images").rglob("*.png"):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    done = call_diffkit("prepare", tmp_path / "images", "-o", tmp_path / "set", "--size", 8, "--holdout", "50%")
    assert done.returncode == 0, done.stderr
    command = ["train", tmp_path / "set", "-o", tmp_path / "run", "--stop-when", "memorizing", "--validate-every", 250]
    command += [
        "--backbone",
        "unet:width=16,multipliers=[1,2],blocks=1,attention=0",
        "--batch-size",
        16,
        "--lr",
        "3e-3",
    ]
    command += ["--steps", 3000, "--device", "cpu", "--preview-every", 0, "--set", "train.ema_half_life=2000"]
    done = run_diffkit(*command)
    assert done.returncode == 0, done.stderr
    assert "begins to memorize its images" in done.stderr
    assert "best.safetensors" in done.stderr
    history = [
        Validated.from_record(each) for each in read_lines(tmp_path / "run" / "metrics.jsonl") if "holdout_loss" in each
    ]
    turn = best(history)
    assert turn is not None
    assert history[-1].images_seen < 48_000
    assert history[-1].images_seen <= max(1.2 * turn.images_seen, turn.images_seen + 4 * 250)
    again = run_diffkit(*command)
    assert again.returncode == 0, again.stderr
    assert "begins to memorize its images" in again.stderr
    assert len(read_lines(tmp_path / "run" / "sessions.jsonl")) == 1


def test_a_rule_without_held_out_images_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "images", {"a": 4, "b": 4})
    assert (
        call_diffkit("prepare", tmp_path / "images", "-o", tmp_path / "set", "--size", 12, "--holdout", "0").returncode
        == 0
    )
    for rule, code, words in (
        ("memorizing", ExitCode.DATA, "--holdout 5%"),
        ("memorising", ExitCode.USAGE, "Did you mean 'memorizing'?"),
    ):
        done = call_diffkit("train", tmp_path / "set", "-o", tmp_path / "run", "--stop-when", rule, "--steps", 1, *TINY)
        assert done.returncode == code
        assert words in done.stderr
        assert not (tmp_path / "run").exists()
    done = call_diffkit("train", tmp_path / "set", "-o", tmp_path / "run", "--steps", 1, *TINY)
    assert done.returncode == 0, done.stderr
    assert not [each for each in read_lines(tmp_path / "run" / "metrics.jsonl") if "holdout_loss" in each]


def test_what_was_due_when_a_signal_came_is_done_at_the_next_start(dataset: Path, tmp_path: Path) -> None:
    given = {"backbone": "unet:width=8,multipliers=[1],blocks=1,attention=0", "train": {"batch_size": 8}}
    given["train"]["precision"] = "float32"  # type: ignore[index]

    def train(run: RunDir, until: int, stop_at: int) -> None:
        training = prepare_training(given, Store.open(dataset), run, "cpu")
        training.begin()
        cadence = Cadence(until_images=until, validate_every=24, preview_every=24)
        events = training.start(cadence, report_every=1, should_stop=lambda: training.state.images_seen == stop_at)
        assert list(events)

    whole, stopped = RunDir(tmp_path / "whole"), RunDir(tmp_path / "stopped")
    train(whole, 40, 0)
    train(stopped, 40, 24)
    assert not any("holdout_loss" in line or "picture" in line for line in read_lines(stopped.metrics))
    train(stopped, 40, 0)
    timed = {"images_per_second", "data_wait"}
    lines = [
        sorted(str({key: line[key] for key in line.keys() - timed}) for line in read_lines(run.metrics))
        for run in (whole, stopped)
    ]
    assert lines[0] == lines[1]
    assert sum("holdout_loss" in line for line in lines[0]) == 2
    assert whole.best.read_bytes() == stopped.best.read_bytes()


def test_where_memory_is_short_passes_of_a_training_its_validation_and_its_previews_shrink(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, most = UNet.forward, 60

    def limited(self: UNet, x: torch.Tensor, c_noise: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        if len(x) > most:
            raise RuntimeError("CUDA out of memory.")
        return forward(self, x, c_noise, **condition)

    monkeypatch.setattr(UNet, "forward", limited)
    often = ("--precision", "float32", "--validate-every", 8, "--preview-every", 8, "--set", "sample.steps=2")
    found = []
    for most in (60, 3):
        run = tmp_path / str(most)
        done = call_diffkit("train", dataset, "-o", run, "--device", "cpu", *TINY, "--steps", 1, *often)
        assert done.returncode == 0, done.stderr
        assert ("from here on 2 images a pass" in done.stderr) == (most == 3)
        lines = [line for line in read_lines(run / "metrics.jsonl") if "holdout_loss" in line or "picture" in line]
        found.append([line["holdout_loss"] if "holdout_loss" in line else line["colour_mean"] for line in lines])
    (loss, *colours), (other_loss, *other_colours) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert np.array(other_colours) == pytest.approx(np.array(colours), abs=0.01)
