from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from diffkit import durable
from diffkit.compose.start import prepare_training
from diffkit.compose.training import Training
from diffkit.engine.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from diffkit.engine.modelfile import KEY, read_tensors, write_tensors
from diffkit.engine.saver import Saver
from diffkit.engine.session import Cadence, Chores, Ended, Event, NotSaved, Previewed, Saved, session
from diffkit.engine.store import Store
from diffkit.engine.train import Progress, State
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir
from test_train import recipe, small_network, trained

NEVER = 1e9


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(3, 5),
        "a.half": torch.randn(7).to(torch.bfloat16),
        "ä.count": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "a.last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors, path = weights(), tmp_path / "a.safetensors"
    write_tensors(path, tensors, {"note": "grün"})
    header = read_tensors(path)[1]
    assert header["note"] == "grün"
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    own, theirs = path.read_bytes(), save({name: tensor.contiguous() for name, tensor in tensors.items()})
    size, their_size = (int.from_bytes(each[:8], "little") for each in (own, theirs))
    assert own[8 + size :] == theirs[8 + their_size :]
    index = json.loads(own[8 : 8 + size])
    assert json.loads(index["__metadata__"][KEY]) == {key: header[key] for key in ("note", "version")}
    del index["__metadata__"]
    assert index == json.loads(theirs[8 : 8 + their_size])


class Slow:
    """A saver whose writing waits until it is let go."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saver = folder, Saver()
        self.free = threading.Event()

    def begin(self, state: State) -> Callable[[], object]:
        def write(checkpoint: Checkpoint) -> None:
            assert self.free.wait(60)
            save_checkpoint(self.folder, checkpoint)

        return self.saver.begin(state.checkpoint(), write)  # type: ignore[return-value]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reserved", [False, True])
def test_what_is_written_is_the_state_as_it_was(tmp_path: Path, layout: torch.memory_format, reserved: bool) -> None:
    state, _ = trained(recipe(), 16, State(small_network().to(memory_format=layout), recipe()))
    then = {name: tensor.clone() for name, tensor in state.checkpoint().tensors.items()}
    slow = Slow(tmp_path)
    if reserved:
        slow.saver.reserve(state.checkpoint())
    first = slow.begin(state)
    trained(recipe(), 32, state, before_update=slow.saver.copied)
    assert not first.done()  # type: ignore[attr-defined]
    slow.free.set()
    first.result()  # type: ignore[attr-defined]
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 16
    assert found.tensors.keys() == then.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in then.items())

    slow.begin(state).result()  # type: ignore[attr-defined]
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 32
    state.restore(found)


def test_weights_change_only_when_they_are_copied() -> None:
    """The copy is held up until after the next step has asked to change the weights."""
    state, _ = trained(recipe(), 16)
    then = {name: tensor.clone() for name, tensor in state.checkpoint().tensors.items()}
    saver, asked, saved = Saver(), threading.Event(), []
    saver._thread.submit(asked.wait, 20)

    def before_update() -> None:
        threading.Timer(0.2, asked.set).start()
        saver.copied()

    writing = saver.begin(state.checkpoint(), lambda copy: saved.append(copy.tensors))
    trained(recipe(), 32, state, before_update=before_update)
    writing.result()
    assert all(torch.equal(saved[0][name], tensor) for name, tensor in then.items())
    assert not all(torch.equal(saved[0][name], tensor) for name, tensor in state.checkpoint().tensors.items())


def test_a_training_that_saves_hands_out_what_it_was(dataset: Path, tmp_path: Path) -> None:
    """As above, through the whole of a training."""
    given = {"data": {"path": str(dataset)}, "train": {"batch_size": 4}}
    training = prepare_training(given, Store.open(dataset), RunDir(tmp_path / "run"), "cpu")
    training.begin()
    steps, asked = training.steps(), threading.Event()
    next(steps)
    then = {name: tensor.clone() for name, tensor in training.state.checkpoint().tensors.items()}
    training.saver._thread.submit(asked.wait, 20)
    writing = training.save()
    threading.Timer(0.2, asked.set).start()
    next(steps)
    writing.result()
    found, _ = latest_checkpoint(training.run.checkpoints)
    assert found is not None and all(torch.equal(found.tensors[name], tensor) for name, tensor in then.items())


def test_what_a_forward_pass_may_change_is_copied_at_once() -> None:
    weight, buffer = torch.ones(3), torch.ones(3)
    saver, asked, saved = Saver(), threading.Event(), []
    saver._thread.submit(asked.wait, 20)
    checkpoint = Checkpoint({"weight": weight, "buffer": buffer}, 8, frozenset({"weight"}))
    writing = saver.begin(checkpoint, lambda copy: saved.append(copy.tensors))
    buffer.zero_()
    asked.set()
    writing.result()
    assert bool((saved[0]["buffer"] == 1).all()) and bool((saved[0]["weight"] == 1).all())


def test_a_save_waits_for_the_memory_that_was_asked_for(tmp_path: Path) -> None:
    """Else what has been copied would be cleared after it."""
    found: list[dict[str, Tensor]] = []
    checkpoint = Checkpoint({f"tensor-{number}": torch.ones(2**20) for number in range(16)}, 8)
    for turn in range(3):
        saver = Saver()
        saver.reserve(checkpoint)
        saver.begin(checkpoint, lambda copy: found.append(copy.tensors)).result()
        (copies,) = found
        assert all(bool((copy == 1).all()) for copy in copies.values()), turn
        found.clear()


def test_a_type_that_no_file_can_hold_is_named(tmp_path: Path) -> None:
    complex_numbers = torch.randn(3, dtype=torch.complex64)
    write_tensors(tmp_path / "a", {"rotary": complex_numbers}, {})
    assert torch.equal(read_tensors(tmp_path / "a")[0]["rotary"], complex_numbers)
    with pytest.raises(DiffkitError, match=r"odd is of type torch\.complex128"):
        write_tensors(tmp_path / "b", {"odd": torch.randn(3, dtype=torch.complex128)}, {})


def steps(state: State, count: int):  # type: ignore[no-untyped-def]
    for number in range(1, count + 1):
        state.images_seen = number * 8
        yield Progress(state.images_seen, number, 1e-3, 0.5)


def chores(save: Callable[[], object]) -> Chores:
    def preview() -> Previewed:
        raise AssertionError

    return Chores(
        save=save,  # type: ignore[arg-type]
        preview=preview,
        validate=None,
        snapshot=lambda: None,
        over=lambda: False,
        measure=None,
        should_stop=lambda: False,
    )


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    state = State(small_network(), recipe())
    slow = Slow(tmp_path)
    events: list[Event] = []
    for event in session(state, steps(state, 40), Cadence(320, save_seconds=0), chores(lambda: slow.begin(state))):
        events.append(event)
        if isinstance(event, Progress) and event.step == 30:
            assert not any(isinstance(each, Saved) for each in events)  # the first save of all has begun at step 1
            slow.free.set()
    saved = [event.images_seen for event in events if isinstance(event, Saved)]
    assert saved[0] == 8 and saved[-1] == 320
    assert isinstance(events[-1], Ended) and isinstance(events[-2], Saved)
    found, _ = latest_checkpoint(tmp_path)
    assert found is not None and found.images_seen == 320


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    state = State(small_network(), recipe())
    slow = Slow(tmp_path)
    slow.free.set()
    monkeypatch.setattr(durable, "write", full)
    seen = []
    with pytest.raises(DiffkitError, match="Disk full") as caught:
        for event in session(
            state, steps(state, 10**6), Cadence(None, save_seconds=0), chores(lambda: slow.begin(state))
        ):
            seen.append(event)
    assert caught.value.code == ExitCode.MACHINE
    assert seen and not any(isinstance(event, Saved) for event in seen)
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_saved_is_not_saved_again_at_the_end(tmp_path: Path) -> None:
    state = State(small_network(), recipe())
    slow = Slow(tmp_path)
    slow.free.set()
    begun = []

    def save() -> object:
        begun.append(state.images_seen)
        return slow.begin(state)

    events = list(session(state, steps(state, 3), Cadence(24, save_seconds=NEVER), chores(save)))
    assert begun == [24]
    assert sum(isinstance(event, Saved) for event in events) == 1


def training_on(dataset: Path, folder: Path) -> Training:
    given = {"data": {"path": str(dataset)}, "train": {"batch_size": 4, "ema_snapshots": 2, "precision": "float32"}}
    training = prepare_training(given, Store.open(dataset), RunDir(folder / "run"), "cpu")
    training.begin()
    training.saved_at = 0
    return training


def held(saver: Saver) -> threading.Event:
    """The saver's thread waits until this is set."""
    free = threading.Event()
    saver._thread.submit(free.wait, 20)
    return free


def test_a_model_and_a_snapshot_are_written_beside_the_training_as_they_were(dataset: Path, tmp_path: Path) -> None:
    training = training_on(dataset, tmp_path)
    steps = training.steps()
    next(steps)
    then = {name: tensor.clone() for name, tensor in training.state.checkpoint().tensors.items()}
    free = held(training.saver)
    training.write_model(training.run.best)
    assert not training.run.best.exists()
    threading.Timer(0.2, free.set).start()
    next(steps)  # waits for the copy
    training.saver.retry()
    tensors, header = read_tensors(training.run.best)
    assert header["images_seen"] == 4
    assert all(torch.equal(tensor, then[f"average.{name}"]) for name, tensor in tensors.items())

    then = {name: tensor.clone() for name, tensor in training.state.checkpoint().tensors.items()}
    training.snapshot()
    next(steps)
    training.saver.retry()
    tensors, header = read_tensors(training.run.snapshots / "images-000000000008.safetensors")
    assert header["lengths"] == [0.05, 0.1]
    assert all(torch.equal(tensor, then[f"track-{name}"]) for name, tensor in tensors.items()) and len(tensors) > 4


def test_what_belongs_to_a_saved_state_is_waited_for(dataset: Path, tmp_path: Path) -> None:
    """Else a line about it could last without it: the state is not made again."""
    training = training_on(dataset, tmp_path)
    training.write_model(training.run.best)
    assert training.run.best.exists()
    next(training.steps())
    training.save()
    training.write_model(training.run.best)
    assert read_tensors(training.run.best)[1]["images_seen"] == 4


def test_a_checkpoint_is_written_after_the_model_before_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, real, order = training_on(dataset, tmp_path), durable.rename, list[str]()
    next(training.steps())

    def rename(source: Path, target: Path) -> None:
        order.append(target.name)
        real(source, target)

    monkeypatch.setattr(durable, "rename", rename)
    training.write_model(training.run.best)
    training.save().result()
    name = "images-000000000004"
    assert order == ["best.safetensors", "state.safetensors", name, "model.safetensors"]


@pytest.mark.parametrize("what", ["best", "snapshot"])
@pytest.mark.parametrize("times", [1, 10**9])
def test_a_model_that_cannot_be_written_ends_the_training_and_is_tried_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, times: int
) -> None:
    training, real, failed = training_on(dataset, tmp_path), durable.rename, list[str]()
    place = {"best": "best.safetensors", "snapshot": "images-000000000024.safetensors"}[what]

    def rename(source: Path, target: Path) -> None:
        if target.name == place and len(failed) < times:
            failed.append(target.name)
            raise OSError(errno.EIO, "once")
        real(source, target)

    monkeypatch.setattr(durable, "rename", rename)
    cadence = Cadence(400, validate_every=16 if what == "best" else 0, snapshot_every=24 if what == "snapshot" else 0)
    events = list[Event]()
    with pytest.raises(DiffkitError, match="Cannot write"):
        for event in training.start(cadence, report_every=1, should_stop=lambda: False):
            events.append(event)
    assert failed
    found, _ = latest_checkpoint(training.run.checkpoints)
    assert found is not None
    if times == 1:
        assert isinstance(events[-1], Saved) and found.images_seen == training.state.images_seen < 400
        assert {path.name for path in training.run.path.rglob("*.safetensors")} >= {place, "model.safetensors"}
    else:  # nothing is saved that says the model is there
        assert isinstance(events[-1], NotSaved) and found.images_seen == 0


def test_the_memory_of_a_copy_is_free_only_when_it_is_written() -> None:
    buffer, saver, free, saved = torch.ones(3), Saver(), threading.Event(), list[Tensor]()

    def write(copy: Checkpoint) -> None:
        assert free.wait(20)
        saved.append(copy.tensors["buffer"].clone())

    saver.keep(Checkpoint({"buffer": buffer}, 8), write)
    buffer.zero_()
    threading.Timer(0.2, free.set).start()
    saver.begin(Checkpoint({"buffer": buffer}, 16), write).result()
    assert [float(each.sum()) for each in saved] == [3, 0]
