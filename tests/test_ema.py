"""Averages put together after training: the mathematics, against numbers and against averages tracked directly."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, call_diffkit
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.ema import LONGEST, Average, combination, gamma_of, overlap, power_decay
from diffkit.core.predictions import v
from diffkit.core.schedules import cosine, over_range
from diffkit.engine.batches import Batches
from diffkit.engine.modelfile import read_model
from diffkit.engine.snapshots import averaged, save_snapshot, snapshots, superfluous
from diffkit.engine.store import Store
from diffkit.engine.train import Recipe, State, train, under
from diffkit.errors import DiffkitError, ExitCode


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.25, LONGEST])
def test_the_exponent_gives_a_window_of_that_length(length: float) -> None:
    gamma = gamma_of(length)
    tau = np.linspace(0, 1, 1_000_001)
    profile = (gamma + 1) * tau**gamma
    mean = np.trapezoid(profile * tau, tau)
    assert np.sqrt(np.trapezoid(profile * (tau - mean) ** 2, tau)) == pytest.approx(length, rel=1e-4)


def test_the_overlap_of_two_windows_is_their_integral() -> None:
    tau = np.linspace(0, 3, 3_000_001)
    for (t1, g1), (t2, g2) in (((1.0, 17.0), (3.0, 7.0)), ((3.0, 17.0), (2.0, 7.0)), ((2.0, 1.0), (2.0, 4.0))):
        profiles = [np.where(tau <= t, (g + 1) * tau**g / t ** (g + 1), 0) for t, g in ((t1, g1), (t2, g2))]
        ours = overlap(*(torch.tensor(each, dtype=torch.float64) for each in (t1, g1, t2, g2)))
        assert float(ours) == pytest.approx(np.trapezoid(profiles[0] * profiles[1], tau), rel=1e-4)


def test_a_running_average_has_the_window_that_its_decay_promises() -> None:
    """The weight of each step, by following one unit through the updates."""
    gamma, batch, steps = gamma_of(0.1), 8, 400
    shares = np.zeros(steps)
    for step in range(steps):
        decay = power_decay((step + 1) * batch, batch, gamma)
        shares *= decay
        shares[step] += 1 - decay
    edges = np.linspace(0, 1, steps + 1) ** (gamma + 1)
    assert shares == pytest.approx(np.diff(edges), rel=1e-6)


def test_what_does_not_change_stays_and_a_stored_average_is_itself() -> None:
    stored = [(time, gamma_of(length)) for time in (250.0, 500.0, 750.0, 1000.0) for length in (0.05, 0.1)]
    weights, error = combination(stored, (1000.0, gamma_of(0.1)))
    assert weights == pytest.approx([0, 0, 0, 0, 0, 0, 0, 1], abs=1e-5)
    assert error < 1e-5
    weights, error = combination(stored, (1000.0, gamma_of(0.15)))
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert 0 < error < 0.2


def test_posthoc_averages_equal_directly_tracked_ones_within_a_hundredth(dataset: Path, tmp_path: Path) -> None:
    from diffkit.backbones.unet import unet

    store = Store.open(dataset)
    torch.manual_seed(0)
    network = unet(store.spec, width=8, multipliers=[1, 2], blocks=1, attention=0)
    recipe = Recipe(8, 8, 3e-3, 100, (0.9, 0.99), 0.0, 1.0, 500.0, 0, ema_lengths=(0.05, 0.1))
    state = State(network, recipe)
    direct = {length: copy.deepcopy(network) for length in (0.04, 0.06, 0.08, 0.12)}
    levels = over_range(cosine, 0.002, 80.0, 1.0)
    batches = Batches(store, store.spec, 0, flip=False, label_dropout=0.1)
    until, header = 320 * 8, {"settings": {}, "spec": store.spec.to_dict(), "mean": list(store.mean)}
    for progress in train(
        state, Denoiser(network, v), batches, levels, squared_error, recipe, until_images=until, report_every=1000
    ):
        seen = progress.images_seen
        for length, average in direct.items():
            Average(average, network).update(power_decay(seen, 8, gamma_of(length)))
        if seen % (until // 16) == 0:
            averages = under(state.checkpoint().tensors, "track-")
            save_snapshot(tmp_path / "snapshots", averages, list(state.tracks), {**header, "images_seen": seen}, 16)
    assert len(snapshots(tmp_path / "snapshots")) == 16
    moved = torch.cat([p.detach().flatten() for p in network.parameters()])
    for made in averaged(tmp_path / "snapshots", list(direct)):
        ours = torch.cat([made.tensors[name].flatten() for name, _ in network.named_parameters()])
        theirs = torch.cat([p.detach().flatten() for p in direct[made.length].parameters()])
        assert float((ours - theirs).norm() / theirs.norm()) < 0.002  # a hundredth is asked for
        assert float((ours - theirs).norm()) < 0.1 * float((moved - theirs).norm())  # and the average is not the end
        assert made.error < 0.015


def test_snapshots_are_thinned_evenly() -> None:
    places: list[int] = []
    for place in range(1, 101):
        places.append(place)
        gone = superfluous(places, 8)
        places = [each for each in places if each not in gone]
    assert len(places) == 8
    assert places[0] == 1
    assert places[-1] == 100
    assert max(np.diff(places)) <= 4 * min(np.diff(places)[:-1])


def test_a_training_with_snapshots_gives_models_of_any_length(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ("--steps", 8, "--ema-snapshots", 4, "--preview-every", 0, *TINY)
    done = call_diffkit("train", dataset, "-o", run, *options)
    assert done.returncode == 0, done.stderr
    assert "4 snapshots of 2, at most" in done.stderr
    assert [path.name for path in snapshots(run / "snapshots")] == [
        f"images-{images:012d}.safetensors" for images in (16, 32, 48, 64)
    ]
    done = call_diffkit("ema", run, "--length", "0.1")
    assert done.returncode == 0, done.stderr
    tensors, header = read_model(run / "ema-0.1.safetensors")
    assert header["ema_length"] == 0.1
    last = load_file(run / "snapshots" / "images-000000000064.safetensors")
    assert all(torch.allclose(value, last[f"0.1.{name}"], atol=1e-6) for name, value in tensors.items())
    sampled = call_diffkit(
        "sample", run / "ema-0.1.safetensors", "-o", tmp_path / "made", "-n", 2, "--steps", 2, "--json"
    )
    assert json.loads(sampled.stdout)["images"] == 2
    swept = call_diffkit("ema", run, "--sweep", "0.05..0.2", "--points", 2, "-n", 20, "--device", "cpu")
    assert swept.returncode == 0, swept.stderr
    assert "KD-lite0" in swept.stdout
    assert "0.050" in swept.stdout
    assert "0.200" in swept.stdout
    assert "--length 0." in swept.stderr


def test_resuming_gives_the_same_snapshots(dataset: Path, tmp_path: Path) -> None:
    command = ["train", dataset, *TINY, "--precision", "float32", "--ema-snapshots", 2, "--preview-every", 0]
    for name, lengths in (("whole", [8]), ("halves", [4, 8])):
        for steps in lengths:
            done = call_diffkit(*command, "-o", tmp_path / name, "--steps", steps)
            assert done.returncode == 0, done.stderr
    left, right = (load_file(snapshots(tmp_path / name / "snapshots")[-1]) for name in ("whole", "halves"))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], ExitCode.USAGE, "--length 0.08, or --sweep"),
        (["--length", "0.5"], ExitCode.USAGE, "lies between 0 and 0.289"),
        (["--length", "0"], ExitCode.USAGE, "lies between 0 and 0.289"),
        (["--length", "0.1"], ExitCode.MODEL, "--ema-snapshots 16"),
        (["--sweep", "0.2"], ExitCode.USAGE, "--sweep 0.02..0.25"),
        (["--sweep", "0.3..0.2"], ExitCode.USAGE, "no range of lengths"),
        (["--sweep", "0.1..0.2", "--metric", "loss"], ExitCode.USAGE, "Choose kid, frechet"),
    ],
)
def test_what_cannot_be_averaged_is_refused(run: Path, arguments: list[str], code: ExitCode, words: str) -> None:
    done = call_diffkit("ema", run, *arguments)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    (tmp_path / "images-000000000008.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(DiffkitError, match="images-000000000008"):
        averaged(tmp_path, [0.1])


def test_an_average_follows_buffers_that_the_network_replaces() -> None:
    """As a network may that counts its calls."""
    network, module = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    average = Average(module, network)
    network.running_mean = torch.full((1,), 3.0)
    with torch.no_grad():
        network.weight.fill_(5.0)  # type: ignore[union-attr]
    average.update(0.75)
    assert float(module.running_mean) == 3.0  # type: ignore[arg-type]
    assert float(module.weight.detach()) == 2.0  # type: ignore[union-attr]
    average.update(0.5, torch.tensor(False))
    assert float(module.weight.detach()) == 2.0  # type: ignore[union-attr]
