"""Labels from tables, and image-to-image tasks, from the command line to the picture."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffkit
from conftest import TINY, call_diffkit, run_diffkit
from diffkit.config import read_toml
from diffkit.durable import read_lines
from diffkit.engine.pictures import psnr
from diffkit.errors import ExitCode

SMALL = ("--backbone", "unet:width=16,multipliers=[1,2],blocks=1,attention=0", "--batch-size", 16, "--device", "cpu")


def blocks(folder: Path, count: int, size: int = 16) -> Path:
    """Images of one colour whose brightness is the attribute, with a light square at one of two sides."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        bright, left = rng.random(), number % 2
        pixels = np.full((size, size, 3), 40 + 120 * bright, np.uint8)
        pixels[4:12, 1:7] = (250, 250, 250) if left else pixels[4:12, 1:7]
        pixels[4:12, 9:15] = pixels[4:12, 9:15] if left else (250, 250, 250)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        lines.append({"file_name": f"{number:03d}.png", "bright": bright, "left": bool(left)})
    (folder.parent / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blocks(tmp_path_factory.mktemp("blocks") / "images", 120)


@pytest.fixture(scope="module")
def labelled(images: Path) -> Path:
    """A model of these images with their attributes, trained for some seconds."""
    table = images.parent / "labels.jsonl"
    done = run_diffkit("prepare", images, "-o", images.parent / "set", "--size", 16, "--labels", table)
    assert done.returncode == 0, done.stderr
    assert "2 attributes: bright 0.0" in done.stderr and "left 0 to 1" in done.stderr
    run = images.parent / "labelled"
    options = ("--steps", 300, "--no-flip", "--lr", 3e-3, "--set", "train.warmup_images=500", *SMALL)
    done = run_diffkit("train", images.parent / "set", "-o", run, "--validate-every", 2000, *options)
    assert done.returncode == 0, done.stderr
    return run


def mean_of(folder: Path, place: tuple[slice, slice]) -> float:
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]
    assert pictures
    return float(np.mean([picture[place].mean() for picture in pictures]))


def test_an_attribute_sets_what_it_says(labelled: Path, tmp_path: Path) -> None:
    corner, left, right = (slice(0, 3), slice(0, 3)), (slice(5, 11), slice(2, 6)), (slice(5, 11), slice(10, 14))
    for name, labels in (("dark", ("bright=0.1", "left=1")), ("light", ("bright=0.9", "left=false"))):
        options = [part for label in labels for part in ("--set-label", label)]
        done = call_diffkit("sample", labelled, "-o", tmp_path / name, "-n", 12, "--device", "cpu", *options)
        assert done.returncode == 0, done.stderr
    assert mean_of(tmp_path / "dark", corner) + 40 < mean_of(tmp_path / "light", corner)
    assert mean_of(tmp_path / "dark", left) > mean_of(tmp_path / "dark", right) + 60
    assert mean_of(tmp_path / "light", right) > mean_of(tmp_path / "light", left) + 30
    (record, *_) = read_lines(tmp_path / "dark" / "samples.jsonl")
    assert record["attributes"] == {"bright": 0.1, "left": 1.0}


def test_the_loss_of_each_noise_level_is_recorded(labelled: Path) -> None:
    records = [record for record in read_lines(labelled / "metrics.jsonl") if "loss_by_level" in record]
    for record in records:
        known = [value for value in record["loss_by_level"] if value is not None]
        assert len(record["loss_by_level"]) == 8
        assert min(known) <= record["loss"] <= max(known)
    assert np.mean([record["loss_by_level"][0] for record in records[-3:]]) > 2 * np.mean(
        [record["loss_by_level"][4] for record in records[-3:]]
    )


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("brihgt=0.5", "No attribute 'brihgt'.*Did you mean 'bright'"),
        ("bright=7", r"bright = 7 lies outside what the model has seen.*Choose 0\.\d+ to 0\.9\d+"),
        ("bright=x", "gives no number"),
    ],
)
def test_attributes_that_the_model_never_saw_are_refused(
    labelled: Path, tmp_path: Path, label: str, words: str
) -> None:
    done = call_diffkit("sample", labelled, "-o", tmp_path / "out", "--set-label", label)
    assert done.returncode == ExitCode.USAGE
    assert re.search(words, " ".join(done.stderr.split())), done.stderr


def test_attributes_are_shown_and_may_be_set_from_python(labelled: Path) -> None:
    done = call_diffkit("show", labelled)
    assert done.returncode == 0, done.stderr
    assert "bright" in done.stdout and "2 attributes" in done.stdout
    model = diffkit.load(labelled, device="cpu")
    dark, light = (model.sample(6, attributes={"bright": value}).mean() for value in (0.1, 0.9))
    assert dark + 25 < light


def test_super_resolution_end_to_end(images: Path, tmp_path: Path) -> None:
    """The low-frequency content is that of the input; the model sees no more of it than one pixel in sixteen."""
    data, run = images.parent / "plain", images.parent / "super"
    done = run_diffkit("prepare", images, "-o", data, "--size", 16)
    assert done.returncode == 0, done.stderr
    options = ("--task", "super-resolution", "--factor", 4, "--steps", 250, "--lr", 3e-3)
    options += ("--set", "train.warmup_images=500", "--preview-every", 3200, "--validate-every", 3200)
    done = run_diffkit("train", data, "-o", run, *options, *SMALL)
    assert done.returncode == 0, done.stderr
    with Image.open(sorted((run / "samples").iterdir())[-1]) as sheet:
        assert sheet.size == (12 * 66 + 2, 6 * 66 + 2)  # what was shown, made and there, four times a row
    config, store = read_toml(run / "config.toml"), json.loads((data / "dataset.json").read_text())
    assert config["near"] is True
    scale = config["prediction"]["sigma_data"] / store["sigma_data"]
    assert 0.05 < scale < 0.9  # what is learned is the difference, and the noise is in proportion
    assert (config["noise"]["shift"], config["noise"]["s_max"]) == pytest.approx((scale, 40 * scale))
    low = tmp_path / "low"
    low.mkdir()
    whole = [np.asarray(Image.open(images / f"{n:03d}.png")) for n in range(6)]
    for number, pixels in enumerate(whole):
        small = pixels.reshape(4, 4, 4, 4, 3).mean((1, 3)).round().astype(np.uint8)
        Image.fromarray(small).save(low / f"{number}.png")
    done = call_diffkit("sample", run, "-o", tmp_path / "high", "--input", low, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "6 images" in done.stderr
    records = read_lines(tmp_path / "high" / "samples.jsonl")
    assert [record["from"] for record in records] == [f"{n}.png" for n in range(6)]
    worth = []
    for number, pixels in enumerate(whole):
        made = np.asarray(Image.open(tmp_path / "high" / f"{number:06d}.png")).astype(float)
        small, wanted = (each.reshape(4, 4, 4, 4, 3).mean((1, 3)) for each in (made, pixels))
        worth.append(psnr(small, wanted))  # type: ignore[arg-type]
    assert np.median(worth) > 20
    for command in (("evaluate", run, "--data", data, "-n", 20), ("report", run, "-o", tmp_path / "report.html")):
        done = call_diffkit(*command, "--device", "cpu") if command[0] == "evaluate" else call_diffkit(*command)
        assert done.returncode == 0, done.stderr
    done = call_diffkit("sample", run, "-o", tmp_path / "none")
    assert done.returncode == ExitCode.USAGE
    assert "makes images from images (super-resolution:factor=4) and was given none" in done.stderr


def test_colours_are_not_learned_from_gray_images(images: Path, tmp_path: Path) -> None:
    assert run_diffkit("prepare", images, "-o", tmp_path / "gray", "--size", 16, "--color", "gray").returncode == 0
    done = call_diffkit("train", tmp_path / "gray", "-o", tmp_path / "run", "--task", "colorize", "--steps", 1, *TINY)
    assert done.returncode == ExitCode.DATA
    assert "there is nothing left to learn" in done.stderr


def test_a_trained_inpainter_keeps_what_is_known(images: Path, tmp_path: Path) -> None:
    data, run = images.parent / "plain2", images.parent / "holes"
    done = run_diffkit("prepare", images, "-o", data, "--size", 16)
    assert done.returncode == 0, done.stderr
    done = run_diffkit("train", data, "-o", run, "--task", "inpaint", "--steps", 3, *TINY)
    assert done.returncode == 0, done.stderr
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 3:12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    source = images / "000.png"
    done = call_diffkit("sample", run, "-o", tmp_path / "a", "--input", source, "--mask", tmp_path / "mask.png")
    assert done.returncode == 0, done.stderr
    made, there = np.asarray(Image.open(tmp_path / "a/000000.png")), np.asarray(Image.open(source))
    assert np.array_equal(made[mask == 0], there[mask == 0])
    assert not np.array_equal(made[mask > 0], there[mask > 0])
    done = call_diffkit("sample", run, "-o", tmp_path / "b", "--input", source)
    assert done.returncode == ExitCode.USAGE
    assert "Say where they are: --mask FILE" in done.stderr


def test_colorize_and_translate_end_to_end(images: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for path in images.iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("L").save(pairs / f"{path.stem}.png")
    data, alone = tmp_path / "paired", tmp_path / "alone"
    done = run_diffkit("prepare", images, "-o", data, "--size", 16, "--pairs", pairs)
    assert done.returncode == 0, done.stderr
    assert "Each has a paired input" in done.stderr
    for task, options in (("colorize", ()), ("translate", ("--no-flip",))):
        done = run_diffkit("train", data, "-o", tmp_path / task, "--task", task, "--steps", 3, *TINY, *options)
        assert done.returncode == 0, done.stderr
        done = call_diffkit("sample", tmp_path / task, "-o", tmp_path / f"{task}-out", "--input", pairs, "-n", 2)
        assert done.returncode == 0, done.stderr
    again = run_diffkit(
        "train", data, "-o", tmp_path / "translate", "--task", "translate", "--steps", 6, *TINY, "--no-flip"
    )
    assert again.returncode == 0, again.stderr
    assert run_diffkit("prepare", images, "-o", alone, "--size", 16).returncode == 0
    done = call_diffkit("train", alone, "-o", tmp_path / "no", "--task", "translate", "--steps", 3, *TINY)
    assert done.returncode == ExitCode.DATA
    assert "holds no pairs of images" in done.stderr and "--pairs FOLDER" in done.stderr


@pytest.mark.parametrize("more", [("--weighting", "min-snr:gamma=3"), ("--set", "train.learned_weighting=true")])
def test_weighted_trainings_resume_exactly(images: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    data = tmp_path / "set"
    assert run_diffkit("prepare", images, "-o", data, "--size", 16).returncode == 0
    for name, steps in (("once", (6,)), ("twice", (3, 6))):
        for count in steps:
            options = ("--steps", count, "--precision", "float32", *TINY, *more)
            done = run_diffkit("train", data, "-o", tmp_path / name, *options)
            assert done.returncode == 0, done.stderr
    one, other = (diffkit.load(tmp_path / name, device="cpu") for name in ("once", "twice"))
    assert one.sha256 == other.sha256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--weighting", "minsnr"), "Did you mean 'min-snr'"),
        (("--task", "superresolution"), "Did you mean 'super-resolution'"),
        (("--task", "colorize", "--factor", 4), "has no option 'factor'"),
        (("--weighting", "p2:gama=1"), "no option 'gama'.*Did you mean 'gamma'"),
    ],
)
def test_unknown_weightings_and_tasks_are_refused(
    dataset: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    done = call_diffkit("train", dataset, "-o", tmp_path / "run", "--steps", 1, *TINY, *options)
    assert done.returncode == ExitCode.USAGE
    assert re.search(words, " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "run").exists()
