"""`diffkit plan`: tried steps become a forecast, which the training is held against."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tape
from conftest import TINY, call_diffkit
from diffkit.compose import planning
from diffkit.engine import gradients, graphs
from diffkit.engine.graphs import Graph
from diffkit.engine.rates import HALVINGS, best_rate
from diffkit.errors import DiffkitError, ExitCode

OPTIONS = (*TINY[:2], "--device", "cpu", "--precision", "float32", "--batch-size", "8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "= 200,000 images = 3,704 epochs" in done.stderr and "memorize its images" in done.stderr
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


def test_what_is_tried_out_first_does_not_count(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*arguments: Any) -> Graph:
        time.sleep(3)
        return tape.record(*arguments)

    for module in (gradients, graphs):
        monkeypatch.setattr(module, "graphs_on", lambda device: True)
    monkeypatch.setattr(gradients, "record", slow)
    done = call_diffkit("plan", dataset, "--json", *OPTIONS)
    assert done.returncode == 0 and json.loads(done.stdout)["images_per_second"] > 6 * 8 / 3, done.stdout


def test_too_little_time_is_refused(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("plan", dataset, "--time", "0.001s", *OPTIONS)
    assert done.returncode == ExitCode.USAGE
    assert "does not get through one batch of 8 images" in done.stderr


def test_a_learning_rate_is_looked_for_and_the_command_has_it(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "RATE_STEPS", 6)
    done = call_diffkit("plan", dataset, "--lr-test", *OPTIONS, "--set", "train.learned_weighting=true")
    assert done.returncode == 0, done.stderr
    lr = float(done.stderr.split("a learning rate of ")[1].split()[0])
    assert 1e-5 < lr < 1 and f"--lr {lr}" in done.stderr


def test_a_rate_that_is_far_off_is_mended(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rate it begins with, it ends within a factor of two of the same, and nothing overrides that."""
    monkeypatch.setattr(planning, "RATE_STEPS", 12)

    def found(lr: float) -> float:
        done = call_diffkit("plan", dataset, "--lr-test", "--json", *OPTIONS, "--set", f"train.lr={lr}")
        assert done.returncode == 0, done.stderr
        return float(json.loads(done.stdout)["lr"])

    def suggested(lr: float) -> float:
        done = call_diffkit(
            "plan", dataset, "--lr-test", *OPTIONS, "--set", f"train.lr={lr}", "--set", "train.clip=0.5"
        )
        assert done.returncode == 0, done.stderr
        (command,) = (line for line in done.stderr.splitlines() if line.startswith("Next: "))
        assert "train.lr" not in command and "--set train.clip=0.5" in command
        return float(command.split("--lr ")[1].split()[0])

    low, high = found(1e-4), suggested(5e-2)
    assert low > 4e-4 and high < 2.5e-2
    assert 0.5 < low / high < 2


def test_the_best_rate_is_where_the_loss_is_lowest() -> None:
    tried = []

    def bowl(lr: float) -> float:
        tried.append(lr)
        return 1 + math.log(lr / 3e-3) ** 2 if lr < 0.05 else math.nan

    for first in (2e-3, 1e-4, 0.1, 0.4):
        tried.clear()
        assert best_rate(bowl, first) == pytest.approx(3e-3, rel=0.02)
        assert len(tried) == len(set(tried))  # none twice
    assert best_rate(lambda lr: lr, 1e-3) == pytest.approx(1e-3 / 2**HALVINGS, rel=0.05)
    assert best_rate(lambda lr: -lr, 1e-3) == pytest.approx(1e-3 * 2**HALVINGS, rel=0.05)
    assert best_rate(lambda lr: 1.0, 1e-3) == pytest.approx(1e-3 / 2**HALVINGS, rel=0.05)
    with pytest.raises(DiffkitError, match=r"diverges at a learning rate of 3\.9e-06 already"):
        best_rate(lambda lr: math.nan, 1e-3)


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


@pytest.mark.parametrize(
    ("processes", "count", "batch", "growth"),
    [
        (1, 50_000, 256, 1),
        (3, 50_000, 768, 3),
        (8, 50_000, 2048, 8),
        (64, 50_000, 4096, 16),
        (8, 5_000, 512, 2),
        (8, 1_000, 256, 1),
        (8, 100, 64, 1),
    ],
)
def test_several_gpus_get_a_larger_batch_and_its_rate_while_a_pass_has_steps_enough(
    processes: int, count: int, batch: int, growth: int, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.compose.settings import new_settings
    from diffkit.engine import devices
    from diffkit.engine.store import Store

    backbone = {"name": "unet", "width": 192, "multipliers": [1, 2], "blocks": 1, "attention": 0}
    given = {"backbone": backbone, "data": {"path": str(dataset)}}
    store, cpu = Store.open(dataset), torch.device("cpu")
    store.count = count
    on_cpu = new_settings(given, store, cpu, processes).train
    assert on_cpu == new_settings(given, store, cpu).train  # its cores are shared
    monkeypatch.setattr(devices, "memory_bytes", lambda device: 80 * 2**30)
    alone, shared = (new_settings(given, store, cpu, number).train for number in (1, processes))
    assert alone.lr is not None and alone.lr < 1e-3
    assert shared.batch_size == batch and shared.micro_batch == alone.batch_size
    assert shared.lr == pytest.approx(min(2e-3, alone.lr * math.sqrt(growth)), rel=0.1)  # two digits
    assert shared.warmup_images == 10_000 * growth
    own = {"batch_size": 96, "warmup_images": 500}
    chosen = new_settings({**given, "train": own}, store, cpu, processes).train
    assert (chosen.batch_size, chosen.warmup_images, chosen.lr) == (96, 500, alone.lr)
