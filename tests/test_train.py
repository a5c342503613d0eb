"""Training: exact resume, invariance to how the work is cut, stopping, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, call_diffkit, run_diffkit
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import v
from diffkit.core.schedules import cosine, over_range
from diffkit.durable import read_lines
from diffkit.engine.batches import Batches
from diffkit.engine.checkpoint import latest_checkpoint, save_checkpoint
from diffkit.engine.resident import budget as resident_budget
from diffkit.engine.resident import resident
from diffkit.engine.train import Progress, Recipe, Reduced, State, train
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec


def same_files(a: Path, b: Path) -> None:
    left, right = load_file(a), load_file(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def state_file(run: Path) -> Path:
    (newest, *_) = sorted((run / "checkpoints").glob("images-*"), reverse=True)
    return newest / "state.safetensors"


@pytest.mark.parametrize("options", [(), ("--precision", "bfloat16", "--set", "backbone.dropout=0.2")])
def test_train_n_and_n_more_is_train_2n_bitwise(dataset: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    command = ["train", dataset, *TINY, "--precision", "float32", "--validate-every", 20, *options]
    for name, lengths in (("whole", [12]), ("halves", [6, 12])):
        for steps in lengths:
            done = run_diffkit(*command, "-o", tmp_path / name, "--steps", steps)
            assert done.returncode == 0, done.stderr
    same_files(state_file(tmp_path / "whole"), state_file(tmp_path / "halves"))
    same_files(tmp_path / "whole/model.safetensors", tmp_path / "halves/model.safetensors")
    losses = [
        [
            (record["images"], record["loss"])
            for record in read_lines(tmp_path / name / "metrics.jsonl")
            if "loss" in record
        ]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_a_signal_saves_and_the_same_command_goes_on(dataset: Path, tmp_path: Path) -> None:
    two_threads = {"OMP_NUM_THREADS": "2"}
    command = ["train", dataset, *TINY, "--precision", "float32", "--steps", "40", "--preview-every", "0"]
    run = tmp_path / "run"
    arguments = [sys.executable, "-m", "diffkit", *map(str, command), "-o", str(run)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env={**os.environ, **two_threads})
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == ExitCode.RESUMABLE, stderr
    assert "goes on from there" in stderr
    seen = latest_checkpoint(run / "checkpoints")[0].images_seen  # type: ignore[union-attr]
    assert 16 <= seen < 320
    done = run_diffkit(*command, "-o", run, **two_threads)
    assert done.returncode == 0, done.stderr
    assert f"going on from {seen:,} images" in done.stderr
    whole = run_diffkit(*command, "-o", tmp_path / "whole", **two_threads)
    assert whole.returncode == 0, whole.stderr
    same_files(state_file(run), state_file(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------ the loop itself


class Memory:
    """Images in memory."""

    def __init__(self, count: int = 40, side: int = 8) -> None:
        rng = np.random.default_rng(0)
        self.count = count
        self.pixels = rng.integers(0, 256, (count, side, side, 1), dtype=np.uint8)
        self.classes = np.arange(count) % 3 - 1
        self.spec = ImageSpec(1, side, side, ("a", "b"))

    def gather(self, indices: np.ndarray, part: str = "train") -> tuple[np.ndarray, np.ndarray]:
        return self.pixels[indices], self.classes[indices]

    def column(self, kind: str, indices: np.ndarray, part: str = "train") -> np.ndarray | None:
        found = {"images": self.pixels, "labels": self.classes}.get(kind)
        return None if found is None else found[indices]


SPEC = ImageSpec(1, 8, 8, ("a", "b"))


def recipe(**changes: object) -> Recipe:
    values = {
        "batch_size": 8,
        "micro_batch": 8,
        "lr": 1e-3,
        "warmup_images": 16,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "clip": 1.0,
        "ema_half_life": 1000.0,
        "seed": 0,
    }
    return Recipe(**{**values, **changes})  # type: ignore[arg-type]


def small_network() -> torch.nn.Module:
    from diffkit.backbones.unet import unet

    torch.manual_seed(0)
    return unet(SPEC, width=8, multipliers=(1, 2), blocks=1, attention=0)


def trained(
    numbers: Recipe, images: int, state: State | None = None, objective=squared_error, before_update=lambda: None
) -> tuple[State, list[float]]:  # type: ignore[no-untyped-def]
    state = state or State(small_network(), numbers)
    steps = train(
        state,
        Denoiser(state.network, v),
        Batches(Memory(), SPEC, numbers.seed, flip=True, label_dropout=0.3),
        over_range(cosine, 0.002, 80.0),
        objective,
        numbers,
        until_images=images,
        before_update=before_update,
    )
    return state, [step.loss for step in steps if isinstance(step, Progress) and step.loss is not None]


def test_micro_batches_change_nothing_but_rounding() -> None:
    whole, losses = trained(recipe(), 80)
    cut, cut_losses = trained(recipe(micro_batch=3), 80)
    assert cut_losses == pytest.approx(losses, rel=1e-5)
    for a, b in zip(whole.network.parameters(), cut.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_first_loss_is_the_one_computed_by_hand() -> None:
    """A zero output at t from the golden sequence: the loss is the mean square of the v target."""
    from diffkit.core.random import Purpose, golden, normal

    _, losses = trained(recipe(), 8)
    batch = Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3).batch(0, 8)
    clean = batch.stored.permute(0, 3, 1, 2).double() / 127.5 - 1
    s = over_range(cosine, 0.002, 80.0)(golden(0, Purpose.TRAIN_LEVEL, torch.arange(8)))[:, None, None, None]
    noise = normal(0, Purpose.TRAIN_NOISE, torch.arange(8), (1, 8, 8)).double()
    target = (noise - s * clean) / (1 + s**2).sqrt()
    assert losses[0] == pytest.approx(float(target.square().mean()), rel=1e-5)


def test_a_loss_that_is_not_finite_ends_the_training_with_its_own_exit_code() -> None:
    def broken(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        loss = squared_error(denoiser, clean, s, noise, condition)
        return loss * (float("nan") if bool((clean[0, 0, 0, 0] > -2).item()) else 1)

    with pytest.raises(DiffkitError, match="no longer finite") as caught:
        trained(recipe(), 80, objective=broken)
    assert caught.value.code == ExitCode.NON_FINITE


def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(tmp_path: Path) -> None:
    state, _ = trained(recipe(), 8)
    with torch.no_grad():
        next(iter(state.network.parameters())).fill_(float("nan"))
    with pytest.raises(DiffkitError, match="no longer finite"):
        save_checkpoint(tmp_path, state.checkpoint())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_checkpoint_brings_back_everything(tmp_path: Path, layout: torch.memory_format) -> None:
    def fresh() -> State:
        return State(small_network().to(memory_format=layout), recipe())

    straight, straight_losses = trained(recipe(), 160, fresh())
    first, losses = trained(recipe(), 80, fresh())
    save_checkpoint(tmp_path, first.checkpoint())
    state = fresh()
    checkpoint, problems = latest_checkpoint(tmp_path)
    assert checkpoint is not None and problems == {}
    state.restore(checkpoint)
    second, more = trained(recipe(), 160, state)
    assert losses + more == straight_losses
    for a, b in zip(straight.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------ batches


def test_an_epoch_shows_every_image_once_and_half_of_them_mirrored() -> None:
    memory = Memory(count=40)
    batches = Batches(memory, SPEC, 0, flip=True, label_dropout=0.0)
    shown = torch.cat([batches.batch(first, 10).stored for first in range(0, 400, 10)]).numpy()
    mirrored = 0
    for epoch in range(10):
        found = set()
        for image in shown[40 * epoch : 40 * epoch + 40]:
            plain = (memory.pixels == image).all((1, 2, 3))
            flipped = (memory.pixels[:, :, ::-1] == image).all((1, 2, 3))
            assert plain.sum() + flipped.sum() == 1
            mirrored += int(flipped.sum())
            found.add(int(np.argmax(plain | flipped)))
        assert len(found) == 40
    assert 150 < mirrored < 250


def test_labels_are_one_hot_and_dropped_at_the_given_share() -> None:
    memory = Memory(count=40)
    label = Batches(memory, SPEC, 0, flip=False, label_dropout=0.3).batch(0, 4000).label
    assert label is not None and set(label.sum(1).tolist()) == {0.0, 1.0}
    labelled = float((memory.classes >= 0).mean())
    assert float(label.sum() / 4000) == pytest.approx(0.7 * labelled, abs=0.03)


def test_crops_cover_the_whole_of_a_larger_store() -> None:
    memory = Memory(count=4, side=12)
    batches = Batches(memory, ImageSpec(1, 8, 8), 0, flip=False, label_dropout=0.0)
    crops = batches.batch(0, 800).stored.numpy()
    corners = set()
    for crop in crops:
        for y in range(5):
            for x in range(5):
                if (memory.pixels[:, y : y + 8, x : x + 8] == crop).all((1, 2, 3)).any():
                    corners.add((y, x))
    assert len(corners) == 25


def test_batches_do_not_depend_on_where_they_begin() -> None:
    batches = Batches(Memory(), SPEC, 3, flip=True, label_dropout=0.5)
    whole = batches.batch(0, 96)
    pieces = [batches.batch(first, 12) for first in range(0, 96, 12)]
    assert torch.equal(whole.stored, torch.cat([piece.stored for piece in pieces]))
    assert whole.label is not None
    assert torch.equal(whole.label, torch.cat([piece.label for piece in pieces if piece.label is not None]))


@pytest.mark.parametrize(("side", "flip"), [(8, False), (8, True), (12, False), (12, True)])
def test_a_set_kept_on_the_device_gives_the_same_batches(side: int, flip: bool) -> None:
    memory = Memory(count=40, side=side)
    kept = resident(memory, ["images"], torch.device("cpu"), 40 * side * side)
    assert kept["images"].dtype == torch.uint8 and np.array_equal(kept["images"].numpy(), memory.pixels)
    read = Batches(memory, SPEC, 3, flip, 0.5).batch(24, 90)
    memory.pixels = np.zeros_like(memory.pixels)
    found = Batches(memory, SPEC, 3, flip, 0.5, resident=kept).batch(24, 90)
    assert torch.equal(found.stored, read.stored) and found.stored.is_contiguous()
    assert found.label is not None and read.label is not None and torch.equal(found.label, read.label)


def test_a_set_is_kept_on_the_device_only_if_it_fits() -> None:
    memory = Memory(count=40, side=8)
    assert resident(memory, ["images"], torch.device("cpu"), 40 * 64 - 1) == {}
    assert resident(memory, ["images"], torch.device("cpu"), None) == {}
    assert resident_budget(torch.device("cpu")) is None


# --------------------------------------------------------------------------------------------------- checkpoints


def damaged(run: Path) -> Path:
    file = state_file(run)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return file


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    state, _ = trained(recipe(), 8)
    save_checkpoint(tmp_path / "checkpoints", state.checkpoint())
    state, _ = trained(recipe(), 16, state)
    save_checkpoint(tmp_path / "checkpoints", state.checkpoint())
    damaged(tmp_path)
    checkpoint, problems = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None and checkpoint.images_seen == 8
    assert "checksum" in next(iter(problems.values()))


def test_with_no_usable_checkpoint_there_is_no_silent_fresh_start(tmp_path: Path) -> None:
    state, _ = trained(recipe(), 8)
    save_checkpoint(tmp_path / "checkpoints", state.checkpoint())
    damaged(tmp_path)
    with pytest.raises(DiffkitError) as caught:
        latest_checkpoint(tmp_path / "checkpoints")
    assert caught.value.code == ExitCode.MODEL


def test_a_damaged_checkpoint_is_set_aside_and_written_anew(dataset: Path, tmp_path: Path) -> None:
    command = ("train", dataset, "-o", tmp_path / "run", *TINY, "--precision", "float32")
    for steps in (3, 6):
        assert call_diffkit(*command, "--steps", steps).returncode == 0
    file = damaged(tmp_path / "run")
    again = call_diffkit(*command, "--steps", 6)
    assert again.returncode == 0, again.stderr
    assert "An older checkpoint is used instead" in again.stderr and "going on from 24 images" in again.stderr
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["damaged-images-000000000048", "images-000000000024", "images-000000000048"]
    assert latest_checkpoint(tmp_path / "run/checkpoints")[1] == {} and file.exists()


def test_a_model_missing_beside_its_checkpoint_is_written_anew(dataset: Path, tmp_path: Path) -> None:
    """As when the process was killed between the two."""
    command = ("train", dataset, "-o", tmp_path / "run", *TINY, "--steps", 2)
    assert call_diffkit(*command).returncode == 0
    model = tmp_path / "run/model.safetensors"
    before = model.read_bytes()
    for change in (model.unlink, lambda: model.write_bytes(before[:-9])):
        change()
        done = call_diffkit(*command)
        assert done.returncode == 0 and "already seen 16 images" in done.stderr
        assert model.read_bytes() == before


def test_a_save_over_a_damaged_checkpoint_replaces_it(tmp_path: Path) -> None:
    state, _ = trained(recipe(), 8)
    save_checkpoint(tmp_path / "checkpoints", state.checkpoint())
    damaged(tmp_path)
    save_checkpoint(tmp_path / "checkpoints", state.checkpoint())
    assert latest_checkpoint(tmp_path / "checkpoints")[1] == {}


def hungry(most: int, error: type[RuntimeError] = torch.OutOfMemoryError, words: str = "out of memory"):  # type: ignore[no-untyped-def]
    """An objective that the memory holds for up to `most` images; it fails after the network has run."""

    def objective(denoiser, clean, s, noise, condition):  # type: ignore[no-untyped-def]
        losses = squared_error(denoiser, clean, s, noise, condition)
        if len(clean) > most:
            raise error(words)
        return losses

    return objective


@pytest.mark.parametrize(
    ("most", "error", "words"),
    [
        (3, torch.OutOfMemoryError, "CUDA out of memory"),
        (1, RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_want_of_memory_makes_smaller_passes_of_the_same_training(
    most: int, error: type[RuntimeError], words: str
) -> None:
    numbers = recipe()
    state = State(small_network(), numbers)
    batches = Batches(Memory(), SPEC, 0, flip=True, label_dropout=0.3)
    levels = over_range(cosine, 0.002, 80.0)
    objective = hungry(most, error, words)
    events = list(train(state, Denoiser(state.network, v), batches, levels, objective, numbers, until_images=80))
    reduced = [event for event in events if isinstance(event, Reduced)]
    assert [event.micro_batch for event in reduced] == ([4, 2] if most == 3 else [4, 2, 1])
    whole, losses = trained(numbers, 80)
    assert [event.loss for event in events if isinstance(event, Progress)] == pytest.approx(losses, rel=1e-6)
    for a, b in zip(whole.network.parameters(), state.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_want_of_memory_for_a_single_image_is_an_error_of_the_machine() -> None:
    with pytest.raises(DiffkitError, match="with a single image") as caught:
        trained(recipe(), 8, objective=hungry(0))
    assert caught.value.code == ExitCode.MACHINE


def test_other_errors_of_an_objective_are_not_taken_for_want_of_memory() -> None:
    with pytest.raises(RuntimeError, match="something else"):
        trained(recipe(), 8, objective=hungry(0, RuntimeError, "something else"))


def test_only_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    state = State(small_network(), recipe())
    for images in (8, 16, 24, 32):
        state, _ = trained(recipe(), images, state)
        save_checkpoint(tmp_path, state.checkpoint())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images-000000000024", "images-000000000032"]


def test_a_failed_save_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffkit import durable

    state, _ = trained(recipe(), 8)
    save_checkpoint(tmp_path, state.checkpoint())
    state, _ = trained(recipe(), 16, state)

    def full(file: object, data: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(DiffkitError, match=r"Disk full: need .* KiB, have") as caught:
        save_checkpoint(tmp_path, state.checkpoint())
    assert caught.value.code == ExitCode.MACHINE
    assert [path.name for path in tmp_path.iterdir()] == ["images-000000000008"]
    assert latest_checkpoint(tmp_path)[0] is not None
