"""`diffkit plan`: tried steps become a forecast, which the training is held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import TINY, call_diffkit
from diffkit.errors import ExitCode

OPTIONS = (*TINY[:2], "--device", "cpu", "--precision", "float32", "--batch-size", "8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffkit.compose import planning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "TRIAL_SECONDS", 0.2)


def test_a_time_becomes_images_and_epochs_and_nothing_is_written(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("plan", dataset, "--time", "10m", "--json", *OPTIONS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = 0.9 * 600 * found["images_per_second"]
    assert found["images"] == pytest.approx(expected, abs=8 + 0.01 * found["images_per_second"])
    assert found["images"] % 8 == 0 and found["epochs"] == pytest.approx(found["images"] / 54, abs=0.01)
    assert (found["batch_size"], found["precision"], found["seconds"]) == (8, "float32", 600)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_without_a_time_it_is_the_time_of_the_default_length(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("plan", dataset, *OPTIONS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "= 200,000 images = 3,704 epochs" in done.stderr and "learn its images by heart" in done.stderr
    assert f"Next: diffkit train {dataset} --backbone" in done.stderr


def test_the_training_says_how_far_the_plan_was_off(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.cli import start

    monkeypatch.setattr(start, "JUDGED_SECONDS", 0.0)
    train = ("train", dataset, "--steps", 2, "--validate-every", 0, "--preview-every", 0, *OPTIONS)
    done = call_diffkit(*train, "-o", tmp_path / "unplanned")
    assert done.returncode == 0 and "Planned" not in done.stderr
    assert call_diffkit("plan", dataset, *OPTIONS).returncode == 0
    done = call_diffkit(*train, "-o", tmp_path / "planned")
    assert done.returncode == 0 and "Planned: " in done.stderr and "It was " in done.stderr, done.stderr
    done = call_diffkit(*train, "-o", tmp_path / "other", "--batch-size", 4)
    assert done.returncode == 0 and "Planned" not in done.stderr


def test_too_little_time_is_refused(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("plan", dataset, "--time", "0.001s", *OPTIONS)
    assert done.returncode == ExitCode.USAGE
    assert "does not get through one batch of 8 images" in done.stderr
