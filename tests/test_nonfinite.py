"""A loss that is not finite: --on-nan abort, skip, rollback."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY, call_diffkit
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.ema import Average
from diffkit.core.predictions import v
from diffkit.core.random import Purpose, golden
from diffkit.core.schedules import cosine, over_range
from diffkit.durable import read_lines
from diffkit.engine.batches import Batches
from diffkit.engine.checkpoint import latest_checkpoint
from diffkit.engine.progress import MOST_SKIPPED, Diverged
from diffkit.engine.store import Store
from diffkit.engine.train import NonFinite, Progress, State, train
from diffkit.errors import ExitCode
from test_train import SPEC, Memory, recipe, same_files, small_network, state_file

BATCH = 8


def ill_at(*steps: int):  # type: ignore[no-untyped-def]
    """An objective whose loss is NaN in these steps: which it is, the noise levels of a batch tell."""
    levels = over_range(cosine, 0.002, 80.0)
    firsts = [float(levels(golden(0, Purpose.TRAIN_LEVEL, torch.tensor([BATCH * (step - 1)])))) for step in steps]

    def objective(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        loss = squared_error(denoiser, clean, s, noise, condition)
        return loss * (math.nan if float(s[0]) in firsts else 1.0)

    return objective


def events_of(state: State, images: int, **options: Any) -> list[Any]:
    return list(
        train(
            state,
            Denoiser(state.network, v),
            Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3),
            over_range(cosine, 0.002, 80.0),
            options.pop("objective", squared_error),
            recipe(),
            until_images=images,
            **options,
        )
    )


def fresh() -> State:
    return State(small_network(), recipe())


def same(a: State, b: State) -> None:
    left, right = a.checkpoint(), b.checkpoint()
    assert left.images_seen == right.images_seen
    assert left.tensors.keys() == right.tensors.keys()
    assert all(torch.equal(value, right.tensors[name]) for name, value in left.tensors.items())


def test_abort_names_the_step_and_leaves_the_state_before_it() -> None:
    state, sound = fresh(), fresh()
    with pytest.raises(Diverged, match=r"at step 5 the loss is no longer finite \(nan\)") as caught:
        events_of(state, 80, objective=ill_at(5))
    assert caught.value.code == ExitCode.NON_FINITE and caught.value.found.first == 32
    events_of(sound, 32)
    same(state, sound)


def test_a_gradient_that_is_not_finite_counts_as_much_as_a_loss() -> None:
    def objective(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        loss = squared_error(denoiser, clean, s, noise, condition)
        loss.register_hook(lambda gradient: gradient * math.inf)
        return loss

    with pytest.raises(Diverged, match="step 1 the norm of the gradients is no longer finite"):
        events_of(fresh(), 80, objective=objective)


def test_between_reports_the_step_is_known_all_the_same() -> None:
    with pytest.raises(Diverged) as caught:
        events_of(fresh(), 80, objective=ill_at(3), report_every=10)
    assert caught.value.found.step == 3


def test_skip_leaves_out_the_update_and_nothing_else() -> None:
    """As a training does that does not look at the batch at all; and the step in between changes nothing."""
    skipped, passed, before, after = fresh(), fresh(), fresh(), fresh()
    events = events_of(skipped, 64, objective=ill_at(3, 6), on_nan="skip")
    found = [event for event in events if isinstance(event, NonFinite)]
    assert [(event.step, event.first, event.action) for event in found] == [(3, 16, "skip"), (6, 40, "skip")]
    steps = [event for event in events if isinstance(event, Progress)]
    assert [step.step for step in steps if step.loss is None] == [3, 6] and len(steps) == 8
    events_of(passed, 64, passed_over={16, 40})
    same(skipped, passed)
    events_of(before, 16)
    events_of(after, 24, objective=ill_at(3), on_nan="skip")
    after.images_seen = before.images_seen
    same(before, after)


def test_a_report_of_several_steps_is_the_mean_of_the_finite_ones() -> None:
    single = [event.loss for event in events_of(fresh(), 40) if isinstance(event, Progress)]
    state = fresh()
    steps = events_of(state, 40, report_every=5)
    (reported,) = [step.loss for step in steps if isinstance(step, Progress) and step.loss is not None]
    assert reported == pytest.approx(sum(single) / 5)
    steps = events_of(fresh(), 40, report_every=5, objective=ill_at(5), on_nan="skip")
    (reported,) = [step.loss for step in steps if isinstance(step, Progress) and step.loss is not None]
    assert reported == pytest.approx(sum(single[:4]) / 4)


def test_skipping_ends_where_nothing_is_finite_any_more() -> None:
    state = fresh()
    with pytest.raises(Diverged, match=f"{MOST_SKIPPED - 1} steps before it, which were skipped") as caught:
        events_of(state, 800, objective=ill_at(*range(4, 100)), on_nan="skip")
    assert caught.value.found.step == 3 + MOST_SKIPPED


def test_an_update_may_be_decided_on_the_device() -> None:
    """As on a GPU, where the host does not wait: a flag that is false changes nothing, one that is true all."""
    gated, plain = fresh(), fresh()
    for state in (gated, plain):
        events_of(state, 24)
        for parameter in state.network.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)
    before = {name: value.clone() for name, value in gated.checkpoint().tensors.items()}
    ill = {name: parameter.grad for name, parameter in gated.network.named_parameters()}
    for parameter in gated.network.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    gated.update(recipe(), 1e-3, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in gated.checkpoint().tensors.items())
    gated.images_seen -= BATCH
    for name, parameter in gated.network.named_parameters():
        parameter.grad = ill[name]
    gated.update(recipe(), 1e-3, torch.tensor(True))
    plain.update(recipe(), 1e-3)
    for name, value in plain.checkpoint().tensors.items():
        torch.testing.assert_close(gated.checkpoint().tensors[name], value, rtol=1e-5, atol=1e-7)


def test_buffers_of_a_step_that_is_left_out_come_back() -> None:
    network, average = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    network.running_mean.fill_(math.nan)  # type: ignore[union-attr]
    Average(average, network).update(0.5, torch.tensor(False))
    assert float(average.running_mean) == float(network.running_mean) == 0.0  # type: ignore[arg-type]
    network.running_mean.fill_(3.0)  # type: ignore[union-attr]
    Average(average, network).update(0.5, torch.tensor(True))
    assert float(average.running_mean) == 3.0  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- the whole training


ILL = """
import torch
from diffkit import hookimpl

FIRSTS, STEPS = [], ()  # the first noise level of each batch of eight, in a training without STEPS that are ill

def ill(s, density):
    if len(s) == 8 and not STEPS:
        FIRSTS.append(float(s[0]))
    worse = float(s[0]) in [FIRSTS[step - 1] for step in STEPS]
    return torch.full_like(s, float("nan") if worse else 1.0)

@hookimpl
def weightings():
    return {"ill": ill}
"""


@pytest.fixture
def ill(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A plugin whose weighting is NaN for the batches of some steps, whenever they come."""
    info = tmp_path / "site" / "ill-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "ill_weighting.py").write_text(ILL)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ill\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffkit]\nill = ill_weighting\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    module = importlib.import_module("ill_weighting")
    assert call_diffkit(*arguments(dataset, tmp_path / "well", "--steps", 9)).returncode == 0
    yield module
    del sys.modules["ill_weighting"]


def arguments(dataset: Path, run: Path, *more: object) -> tuple[object, ...]:
    return ("train", dataset, "-o", run, *TINY, "--precision", "float32", "--weighting", "ill", *more)


def lines(run: Path) -> list[dict[str, Any]]:
    """Strictly: NaN is no JSON."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_abort_says_the_step_the_images_and_the_last_checkpoint(ill: Any, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ill.STEPS = (3,)
    done = call_diffkit(*arguments(dataset, run, "--steps", 6))
    assert done.returncode == ExitCode.NON_FINITE
    assert "at step 3 the loss is no longer finite (nan)" in done.stderr
    assert "The only checkpoint is that of the beginning" in done.stderr and "is sound" not in done.stderr
    (noted,) = [line for line in lines(run) if "non_finite" in line]
    assert noted["loss"] is None and noted["step"] == 3 and noted["on_nan"] == "abort"
    ids = [record["id"] for record in read_lines(dataset / "examples.jsonl") if record["part"] == "train"]
    store = Store.open(dataset)
    indices = Batches(store, store.spec, 0, False, 0.0).indices(torch.arange(16, 24)).tolist()
    assert noted["examples"] == [ids[index] for index in indices]
    assert all(name in done.stderr for name in noted["examples"])

    run = tmp_path / "later"
    ill.STEPS = ()
    assert call_diffkit(*arguments(dataset, run, "--steps", 2)).returncode == 0
    ill.STEPS = (4,)
    done = call_diffkit(*arguments(dataset, run, "--steps", 6))
    assert done.returncode == ExitCode.NON_FINITE
    path = run / "checkpoints" / "images-000000000016"
    assert f"The last checkpoint, {path}, is sound." in done.stderr and f"--init {run}" in done.stderr
    assert sorted(each.name for each in (run / "checkpoints").iterdir()) == ["images-000000000000", path.name]


def test_rollback_is_skip_but_for_the_way_and_a_start_in_between_changes_nothing(
    ill: Any, dataset: Path, tmp_path: Path
) -> None:
    ill.STEPS = (4, 7)
    for policy in ("skip", "rollback"):
        done = call_diffkit(*arguments(dataset, tmp_path / policy, "--steps", 9, "--on-nan", policy))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("is no longer finite (nan)") == 2
    assert "back to 0 images" in done.stderr
    for steps in (5, 9):
        halves = arguments(dataset, tmp_path / "halves", "--steps", steps, "--on-nan", "rollback")
        assert call_diffkit(*halves).returncode == 0
    for other in ("rollback", "halves"):
        same_files(state_file(tmp_path / "skip"), state_file(tmp_path / other))
    losses = [
        [(line["step"], line["loss"]) for line in lines(tmp_path / policy) if line.get("loss") is not None]
        for policy in ("skip", "rollback", "halves")
    ]
    assert losses[0] == losses[1] == losses[2] and [step for step, _ in losses[0]] == [1, 2, 3, 5, 6, 8, 9]
    (session, _) = read_lines(tmp_path / "halves/sessions.jsonl")
    assert session["on_nan"] == "rollback"


def test_rollbacks_come_to_an_end(ill: Any, dataset: Path, tmp_path: Path) -> None:
    ill.STEPS = (2, 3, 4, 5)
    done = call_diffkit(*arguments(dataset, tmp_path / "run", "--steps", 9, "--on-nan", "rollback"))
    assert done.returncode == ExitCode.NON_FINITE
    assert "(nan). It has gone back to a checkpoint 3 times. Its batch: " in done.stderr
    assert "--on-nan" not in done.stderr  # it is on already
    found, _ = latest_checkpoint(tmp_path / "run/checkpoints")
    assert found is not None and all(bool(torch.isfinite(value).all()) for value in found.tensors.values())


def test_a_held_out_loss_that_is_not_finite_is_never_written_as_such(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.engine.validate import Validation

    monkeypatch.setattr(Validation, "_losses", lambda *_: (0.5, math.inf))
    command = ("train", dataset, *TINY, "--steps", 3, "--validate-every", 8)
    done = call_diffkit(*command, "-o", tmp_path / "abort")
    assert done.returncode == ExitCode.NON_FINITE
    assert "the held-out loss of the averaged weights is no longer finite (inf)" in done.stderr
    done = call_diffkit(*command, "-o", tmp_path / "skip", "--on-nan", "skip")
    assert done.returncode == 0, done.stderr
    assert sum("non_finite" in line for line in lines(tmp_path / "skip")) == 3
    assert not (tmp_path / "skip/best.safetensors").exists()


def test_a_policy_that_there_is_not_is_refused(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", *TINY, "--on-nan", "skpi")
    assert done.returncode == ExitCode.USAGE and "Did you mean 'skip'" in done.stderr
    assert not (tmp_path / "run").exists()
