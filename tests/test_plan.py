"""`diffkit plan`: tried steps become a forecast, which the training is held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import TINY, call_diffkit
from diffkit.engine.rangetest import HIGHEST, LOWEST, SAFETY, suggested
from diffkit.errors import DiffkitError, ExitCode

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


@pytest.mark.parametrize("more", [(), ("--set", "train.learned_weighting=true")])
def test_the_range_test_finds_a_learning_rate_and_the_command_has_it(dataset: Path, more: tuple[str, ...]) -> None:
    done = call_diffkit("plan", dataset, "--lr-test", *OPTIONS, *more)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "range test" in line)
    if "the default stands" in line:
        assert "--lr" not in done.stderr
        return
    lr = float(line.split("learning rate of ")[1].split()[0])
    assert LOWEST / SAFETY <= lr <= HIGHEST / SAFETY
    assert f"--lr {lr}" in done.stderr


def test_a_rate_well_below_where_the_loss_breaks_away_is_suggested() -> None:
    rates = [1e-4 * 10 ** (number / 4) for number in range(13)]
    falling = [1.0 / (1 + number) for number in range(13)]
    assert suggested(list(zip(rates, falling, strict=True))) is None
    broken = [*falling[:9], 0.3, 0.5, 1.2, 4.0]  # 1/9 was the lowest
    assert suggested(list(zip(rates, broken, strict=True))) == pytest.approx(rates[9] / SAFETY, rel=0.05)
    with pytest.raises(DiffkitError, match=r"diverges at a learning rate of 0\.0001"):
        suggested([])
    bump = [1.0, 0.5, 0.9, *falling[3:]]  # one bad batch is no break
    assert suggested(list(zip(rates, bump, strict=True))) is None


def test_the_batch_size_may_be_left_to_diffkit_by_its_name(dataset: Path) -> None:
    options = (*TINY[:2], "--device", "cpu", "--precision", "float32", "--json")
    found = [
        json.loads(call_diffkit("plan", dataset, *options, *more).stdout)["batch_size"]
        for more in ((), ("--batch-size", "auto"), ("--batch-size", "7"))
    ]
    assert found[0] == found[1] and found[2] == 7
    for command in ("plan", "train"):
        for text in ("0", "-3", "lots", "4.5"):
            done = call_diffkit(command, dataset, f"--batch-size={text}")
            assert done.returncode == ExitCode.USAGE and "at least 1, or auto" in done.stderr, done.stderr


def test_a_batch_that_no_machine_can_read_is_refused_with_one_that_fits(dataset: Path) -> None:
    done = call_diffkit("train", dataset, "--batch-size", 10**12, "--device", "cpu")
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert "A batch of 1,000,000,000,000 images is too large" in done.stderr and "fit" in done.stderr


def test_a_large_batch_is_computed_in_pieces_that_the_machine_holds(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.compose.settings import new_settings
    from diffkit.engine import devices
    from diffkit.engine.store import Store

    monkeypatch.setattr(devices, "machine_memory", lambda: 2**30)
    given = {"train": {"batch_size": 2**15}, "data": {"path": str(dataset)}}
    train = new_settings(given, Store.open(dataset), torch.device("cpu")).train
    assert train.batch_size == 2**15 and train.micro_batch is not None and 1 < train.micro_batch < 2**12
    given["train"] = {"batch_size": 64}
    train = new_settings(given, Store.open(dataset), torch.device("cpu")).train
    assert (train.batch_size, train.micro_batch) == (64, 64)
