"""Sampling: the same image at any batch size, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import diffkit
from conftest import run_diffkit
from diffkit.core.denoiser import Denoiser
from diffkit.core.predictions import edm
from diffkit.core.samplers.multistep import dpmpp_2m
from diffkit.core.samplers.onestep import ancestral
from diffkit.core.schedules import loglinear, over_range, sampling_grid
from diffkit.durable import read_lines
from diffkit.engine.sample import Plan, sample
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec


@pytest.fixture(scope="module")
def wide_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose network is no longer close to zero, so that images differ."""
    folder = tmp_path_factory.mktemp("runs") / "wide"
    options = ("--backbone", "unet:width=16,multipliers=[1,2],blocks=1,attention=8", "--lr", "3e-3", "--device", "cpu")
    done = run_diffkit(
        "train", dataset, "-o", folder, "--steps", 60, "--batch-size", 16, *options, "--set", "train.warmup_images=100"
    )
    assert done.returncode == 0, done.stderr
    return folder


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b.astype(float)).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def test_same_seed_same_image_at_batch_sizes_1_7_and_64(wide_run: Path) -> None:
    model = diffkit.load(wide_run, device="cpu")
    images = {batch: model.sample(64, seed=5, classes=["high", "low"], batch_size=batch) for batch in (1, 7, 64)}
    assert len(np.unique(images[64].reshape(64, -1), axis=0)) == 64
    for batch in (1, 7):
        assert np.abs(images[batch].astype(int) - images[64].astype(int)).max() <= 1


def test_bfloat16_gives_the_same_pictures_at_any_batch_size(wide_run: Path) -> None:
    model = diffkit.load(wide_run, device="cpu", precision="bfloat16")
    images = {batch: model.sample(16, seed=5, classes=["high", "low"], batch_size=batch) for batch in (1, 7, 16)}
    assert all(psnr(images[batch], images[16]) >= 40 for batch in (1, 7))


def test_the_stochastic_sampler_is_a_function_of_the_seed_too(wide_run: Path) -> None:
    model = diffkit.load(wide_run, device="cpu")
    a, b, c = (
        model.sample(8, seed=seed, sampler="ddpm", steps=6, batch_size=n) for seed, n in ((1, 8), (1, 3), (2, 8))
    )
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert np.abs(a.astype(int) - c.astype(int)).max() > 20


class Ideal(nn.Module):
    """For data of one colour and standard deviation sd under edm's prediction: the exact network."""

    def __init__(self, mean: float, sd: float) -> None:
        super().__init__()
        self.mean, self.sd = nn.Parameter(torch.tensor(mean)), sd

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        s = torch.exp(4 * c_noise)[:, None, None, None]
        root = (s**2 + self.sd**2).sqrt()
        clean = self.mean + self.sd**2 / root**2 * (x * root - self.mean)
        return (clean - self.sd**2 / root**2 * (x * root)) / (s * self.sd / root)


@pytest.mark.parametrize("sampler", [dpmpp_2m, ancestral])
def test_samples_of_an_exact_model_have_the_mean_and_spread_of_the_data(sampler) -> None:  # type: ignore[no-untyped-def]
    mean, sd = 0.4, 0.15
    denoiser = Denoiser(Ideal(mean, sd), lambda s: edm(s, sigma_data=sd))
    # First-order samplers lose variance in proportion to the step: 400 steps leave about 1 %.
    sigmas = sampling_grid(over_range(loglinear, 0.002, 80.0), 400)
    plan = Plan(sampler, sigmas, mean=[mean], seed=3)
    batches = sample(denoiser, ImageSpec(1, 16, 16), plan, range(100), batch_size=50)
    pixels = np.concatenate([batch.pixels for batch in batches]) / 127.5 - 1
    n = pixels.size
    assert abs(pixels.mean() - mean) < 4 * sd / n**0.5 + 1e-3
    assert abs(pixels.std() / sd - 1) < 0.015


def test_a_model_describes_itself_in_one_line(wide_run: Path) -> None:
    text = repr(diffkit.load(wide_run, device="cpu"))
    assert text.startswith("<Model 12x12x3, 2 classes, ") and "960 images seen, on cpu" in text and "\n" not in text


def test_guidance_goes_beyond_the_class(wide_run: Path) -> None:
    """The classes differ in where the bar is: guidance makes the row of the asked class brighter still."""
    model = diffkit.load(wide_run, device="cpu")

    def contrast(guidance: float) -> float:
        images = model.sample(32, classes=["high"], guidance=guidance).astype(float).mean((0, 2, 3))
        return float(images[2:4].mean() - images[5:7].mean())

    assert contrast(0.0) < contrast(1.0) < contrast(2.0)


def test_the_command_writes_class_folders_records_and_a_grid(wide_run: Path, tmp_path: Path) -> None:
    done = run_diffkit(
        "sample", wide_run, "-o", tmp_path / "out", "-n", 10, "--steps", 4, "--seed", 3, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert "4 steps = 4 network calls" in done.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "high", "low", "samples.jsonl"]
    records = read_lines(out / "samples.jsonl")
    assert [record["index"] for record in records] == list(range(10))
    assert {(record["class"], record["index"] % 2) for record in records} == {("high", 0), ("low", 1)}
    header = diffkit.load(wide_run, device="cpu")
    images = header.sample(10, classes=["high", "low"], steps=4, seed=3)
    for record, expected in zip(records, images, strict=True):
        with Image.open(out / record["file"]) as image:
            assert np.abs(np.asarray(image).astype(int) - expected.astype(int)).max() <= 1
        assert record["model"] == header.sha256
        assert (record["seed"], record["steps"], record["network_calls"]) == (3, 4, 4)


def test_only_makes_one_image_of_a_set_again(wide_run: Path, tmp_path: Path) -> None:
    for name, options in (("all", ("-n", 6)), ("one", ("--only", 3))):
        done = run_diffkit("sample", wide_run, "-o", tmp_path / name, "--steps", 4, "--device", "cpu", *options)
        assert done.returncode == 0, done.stderr
    (record,) = read_lines(tmp_path / "one/samples.jsonl")
    with Image.open(tmp_path / "all" / record["file"]) as a, Image.open(tmp_path / "one" / record["file"]) as b:
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_samples_can_be_prepared_and_trained_on(wide_run: Path, tmp_path: Path) -> None:
    made = run_diffkit("sample", wide_run, "-o", tmp_path / "out", "-n", 12, "--steps", 3, "--device", "cpu", "--json")
    assert (tmp_path / "out" / "grid.png").exists()
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["images"] == 12
    done = run_diffkit("prepare", tmp_path / "out", "-o", tmp_path / "set", "--size", 12, "--holdout", 0, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["classes"] == {"high": 6, "low": 6}
    assert (summary["images"], summary["unlabelled"], summary["rejected"]) == (12, 0, 0)


def test_raw_weights_differ_from_averaged_ones(wide_run: Path) -> None:
    averaged, raw = (diffkit.load(wide_run, device="cpu", raw=raw).sample(4, steps=4) for raw in (False, True))
    assert np.abs(averaged.astype(int) - raw.astype(int)).max() > 1


def test_the_model_file_alone_is_enough(wide_run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "anything.safetensors"
    alone.write_bytes((wide_run / "model.safetensors").read_bytes())
    a, b = (diffkit.load(path, device="cpu").sample(4, seed=1) for path in (wide_run, alone))
    assert np.array_equal(a, b)
    assert a.shape == (4, 12, 12, 3) and a.dtype == np.uint8


def test_defaults_chosen_later_are_used(wide_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((wide_run / "model.safetensors").read_bytes())
    (tmp_path / "defaults.toml").write_text('[sample]\nsampler = "heun"\nsteps = 3\n')
    plan = diffkit.load(tmp_path, device="cpu").plan()
    assert plan.names["sampler"] == "heun"
    assert len(plan.sigmas) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[:5], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "checksum"),
        (lambda data: b"\x80\x04 a pickle, say", "truncated or not a safetensors file"),
    ],
)
def test_a_damaged_model_is_refused(wide_run: Path, tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "model.safetensors"
    file.write_bytes(change((wide_run / "model.safetensors").read_bytes()))
    with pytest.raises(DiffkitError, match=words) as caught:
        diffkit.load(file, device="cpu")
    assert caught.value.code == ExitCode.MODEL


def test_a_missing_plugin_is_named_with_the_pip_install(wide_run: Path, tmp_path: Path) -> None:
    from diffkit.engine.modelfile import read_tensors, write_tensors

    tensors, header = read_tensors(wide_run / "model.safetensors")
    header["settings"]["prediction"] = {"name": "exotic"}
    header["settings"]["parts"]["prediction"] = {"name": "exotic", "distribution": "diffkit-exotic", "version": "2.1"}
    write_tensors(tmp_path / "model.safetensors", tensors, header)
    with pytest.raises(DiffkitError, match=r"pip install 'diffkit-exotic==2\.1'") as caught:
        diffkit.load(tmp_path, device="cpu")
    assert caught.value.code == ExitCode.MODEL
