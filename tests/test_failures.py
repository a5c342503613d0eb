"""What ends a training before its time: its last sound state is saved, and whose part it was is said."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import TINY, call_diffkit
from diffkit import durable
from diffkit.core.ema import Average
from diffkit.durable import read_lines
from diffkit.engine.checkpoint import latest_checkpoint
from diffkit.engine.train import State
from diffkit.errors import ExitCode
from test_train import recipe, same_files, small_network, state_file, trained

BATCH = 5
PLUGIN = """
import torch
from torch import nn
from diffkit import hookimpl
from diffkit.core.samplers.onestep import euler

FAILING, AT, calls = "", 0, 0

def _call(part):
    global calls
    if part != FAILING:
        return
    calls += 1
    if calls == AT:
        ERROR()

def tangent(t):
    if len(t) == 5:  # a training step
        _call("scheduler")
    return torch.tan(t * 1.5)

def plain(s, density):
    if len(s) == 5:
        _call("weighting")
    return torch.ones_like(s)

def darker(images, draw, mask):
    if len(images) == 5:
        _call("task")
    return images[:, :1] / 2

class Network(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.out = nn.BatchNorm2d(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x, c_noise, image=None, label=None):
        x = x if image is None else torch.cat([x, image], 1)
        x = self.norm(x)
        if self.training:
            _call("backbone")
        return self.out(x)

def small(spec):
    return Network(spec.channels + spec.image_channels)

def slow(denoise, x, sigmas, noise):
    _call("sampler")
    yield from euler(denoise, x, sigmas, noise)

@hookimpl
def schedules():
    return {"tangent": tangent}

@hookimpl
def weightings():
    return {"plain": plain}

@hookimpl
def tasks():
    return {"darker": darker}

@hookimpl
def backbones():
    return {"small": small}

@hookimpl
def samplers():
    return {"slow": slow}
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A plugin of every kind of part, installed as pip would; the attributes of its module say when it fails."""
    home = tmp_path / "site"
    info = home / "ill-2.5.dist-info"
    info.mkdir(parents=True)
    (home / "ill_parts.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ill\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[diffkit]\nill = ill_parts\n")
    monkeypatch.syspath_prepend(str(home))
    importlib.invalidate_caches()
    yield importlib.import_module("ill_parts")  # type: ignore[misc]
    del sys.modules["ill_parts"]


def fails(plugin: SimpleNamespace, part: str, at: int, error: BaseException) -> None:
    def raising() -> None:
        raise error

    plugin.FAILING, plugin.AT, plugin.calls, plugin.ERROR = part, at, 0, raising


def command(dataset: Path, run: Path, *more: object) -> tuple[object, ...]:
    always = ("--batch-size", BATCH, "--device", "cpu", "--precision", "float32", "--validate-every", 0)
    return ("train", dataset, "-o", run, "--backbone", "small", "--preview-every", 0, *always, *more)


@pytest.mark.parametrize(
    ("part", "options", "error"),
    [
        ("scheduler 'tangent'", ("--scheduler", "tangent"), RuntimeError("boom")),
        ("scheduler 'tangent'", ("--scheduler", "tangent"), SystemExit(0)),
        ("scheduler 'tangent'", ("--scheduler", "tangent"), GeneratorExit()),
        ("scheduler 'tangent'", ("--scheduler", "tangent"), StopIteration()),
        ("weighting 'plain'", ("--weighting", "plain"), KeyboardInterrupt()),
        ("task 'darker'", ("--task", "darker"), ValueError("boom")),
        ("backbone 'small'", (), IndexError("boom")),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_a_part_that_fails_in_a_step_is_named_and_the_steps_before_it_are_kept(
    plugin: SimpleNamespace, dataset: Path, tmp_path: Path, part: str, options: tuple[str, ...], error: BaseException
) -> None:
    fails(plugin, part.split()[0], 4, error)
    done = call_diffkit(*command(dataset, tmp_path / "run", *options, "--steps", 6))
    assert done.returncode == ExitCode.BUG, done.stderr
    assert f"The {part} of the plugin ill 2.5 failed after {3 * BATCH} images: {type(error).__name__}" in done.stderr
    assert "Saved; the same command goes on from there." in done.stderr
    fails(plugin, "", 0, error)
    whole = call_diffkit(*command(dataset, tmp_path / "whole", *options, "--steps", 3))
    assert whole.returncode == 0, whole.stderr
    same_files(state_file(tmp_path / "run"), state_file(tmp_path / "whole"))
    assert call_diffkit(*command(dataset, tmp_path / "run", *options, "--steps", 6)).returncode == 0


def test_a_sampler_that_fails_in_a_preview_costs_no_step(
    plugin: SimpleNamespace, dataset: Path, tmp_path: Path
) -> None:
    fails(plugin, "sampler", 3, SystemExit(0))  # it is tried at the beginning, and before it is used
    sampler = ("--set", "sample.sampler=slow", "--preview-every", 3 * BATCH)
    done = call_diffkit(*command(dataset, tmp_path / "run", *sampler, "--steps", 6))
    assert done.returncode == ExitCode.BUG, done.stderr
    assert f"The sampler 'slow' of the plugin ill 2.5 failed after {3 * BATCH} images: SystemExit: 0." in done.stderr
    found, _ = latest_checkpoint(tmp_path / "run/checkpoints")
    assert found is not None and found.images_seen == 3 * BATCH


def test_where_the_state_cannot_be_saved_either_both_are_said(
    plugin: SimpleNamespace, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: object) -> None:
        raise OSError(28, "no space")

    def boom() -> None:
        monkeypatch.setattr(durable, "write", full)
        raise RuntimeError("boom")

    fails(plugin, "backbone", 4, RuntimeError())
    plugin.ERROR = boom
    done = call_diffkit(*command(dataset, tmp_path / "run", "--steps", 6))
    assert done.returncode == ExitCode.BUG
    assert "RuntimeError: boom." in done.stderr and "It could not be saved: Disk full: need" in done.stderr
    checkpoint, problems = latest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None and (checkpoint.images_seen, problems) == (0, {})


def test_an_error_of_our_own_is_a_bug_after_which_the_run_goes_on(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(state: object, *rest: object) -> None:
        if update_count.append(1) or len(update_count) == 4:
            raise ZeroDivisionError("ours")
        update(state, *rest)  # type: ignore[arg-type]

    update_count: list[int] = []
    update = State.update
    arguments = ("train", dataset, "-o", tmp_path / "run", "--steps", 6, *TINY)
    with monkeypatch.context() as patch:
        patch.setattr(State, "update", broken)
        done = call_diffkit(*arguments)
    assert done.returncode == ExitCode.BUG
    assert "saved at 24 images" in done.stderr and "Bug: ZeroDivisionError: ours" in done.stderr
    again = call_diffkit(*arguments)
    assert again.returncode == 0 and "going on from 24 images" in again.stderr


def test_a_state_of_two_steps_at_once_is_never_saved(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        if calls.append(1) or len(calls) == 4:
            raise RuntimeError("amid the update")
        update(*arguments)

    calls: list[int] = []
    update = Average.update
    monkeypatch.setattr(Average, "update", broken)
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", "--steps", 6, *TINY)
    assert done.returncode == ExitCode.BUG
    assert "Not saved at 24 images" in done.stderr
    checkpoint, problems = latest_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint is not None and (checkpoint.images_seen, problems) == (0, {})


def test_whoever_stops_listening_finds_the_training_saved(dataset: Path, tmp_path: Path) -> None:
    from diffkit.compose import prepare_training
    from diffkit.engine.session import Cadence
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir

    backbone = {"name": "unet", "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": 0}
    given = {"backbone": backbone, "train": {"batch_size": 8, "precision": "float32"}, "data": {"path": str(dataset)}}
    training = prepare_training(given, Store.open(dataset), RunDir(tmp_path / "run"), "cpu")
    training.begin()
    events = training.start(Cadence(None), report_every=1, should_stop=lambda: False)
    for _ in zip(range(3), events, strict=False):
        pass
    events.close()
    found, _ = latest_checkpoint(tmp_path / "run/checkpoints")
    assert found is not None and found.images_seen == training.state.images_seen == 24


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("std::bad_alloc"), RuntimeError("std::bad_alloc")])
def test_want_of_memory_halves_the_pass_whatever_its_name(error: Exception) -> None:
    def objective(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        if len(clean) > 4:
            raise error
        return (denoiser(clean, s, condition) - clean).square().mean((1, 2, 3))

    def same(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        return (denoiser(clean, s, condition) - clean).square().mean((1, 2, 3))

    assert trained(recipe(), 40, objective=objective)[1] == pytest.approx(trained(recipe(), 40, objective=same)[1])


def test_too_little_memory_for_one_image_is_the_machines_and_says_how_much_is_needed(
    plugin: SimpleNamespace, dataset: Path, tmp_path: Path
) -> None:
    def greedy() -> None:
        plugin.calls = 3  # and again
        raise MemoryError

    fails(plugin, "backbone", 4, MemoryError())
    plugin.ERROR = greedy
    done = call_diffkit(*command(dataset, tmp_path / "run", "--steps", 6))
    assert done.returncode == ExitCode.MACHINE, done.stderr
    assert "with a single image" in done.stderr and "it needs about" in done.stderr and "Saved;" in done.stderr
    assert done.stderr.count("Out of memory") == 2  # 5 images, 2, 1


def test_a_pass_that_is_given_up_leaves_no_trace_in_the_buffers() -> None:
    network = torch.nn.Sequential(small_network(), torch.nn.BatchNorm2d(1))
    state = State(network, recipe())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()[1](torch.randn(4, 1, 8, 8))
    assert not torch.equal(network[1].running_mean, before["1.running_mean"])  # type: ignore[arg-type]
    state.forget_pass()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_line_that_could_not_be_written_is_there_once_its_state_is_saved(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = durable.write, []

    def write(file: Any, data: Any) -> None:
        if b'"step": 3' in bytes(data) and not failed:
            failed.append(data)
            raise OSError(errno.EIO, "Input/output error")
        real(file, data)

    monkeypatch.setattr(durable, "write", write)
    run = tmp_path / "run"
    options = ("train", dataset, "-o", run, *TINY, "--preview-every", 0, "--validate-every", 0, "--steps", 5)
    assert call_diffkit(*options).returncode == ExitCode.MACHINE
    assert failed
    assert call_diffkit(*options).returncode == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("error", [RuntimeError("boom"), SystemExit(0)])
def test_outside_a_training_too_a_failing_part_is_named(
    plugin: SimpleNamespace, run: Path, tmp_path: Path, error: BaseException
) -> None:
    fails(plugin, "sampler", 2, error)  # the first call is a trial
    options = ("--sampler", "slow", "--steps", 2, "-n", 1, "--device", "cpu", "-o", tmp_path / "out")
    done = call_diffkit("sample", run, *options)
    assert done.returncode == ExitCode.BUG
    assert "The sampler 'slow' of the plugin ill 2.5 failed" in done.stderr
    assert type(error).__name__ in done.stderr and "Bug:" not in done.stderr
