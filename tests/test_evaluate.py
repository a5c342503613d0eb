"""`diffkit evaluate`: runs and folders against prepared sets and folders, what is kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import TINY, call_diffkit, run_diffkit, write_images
from diffkit.durable import read_lines
from diffkit.errors import ExitCode
from diffkit.measure.images import open_images, spread


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def values(found: dict[str, object], key: str = "metrics") -> dict[str, float]:
    return {each["name"]: each["value"] for each in found[key]}  # type: ignore[attr-defined]


def test_a_run_is_evaluated_and_the_figures_are_kept_beside_it(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call_diffkit("train", dataset, "-o", run, "--steps", 2, "--preview-every", 0, *TINY).returncode == 0
    done = run_diffkit("evaluate", run, "-n", 40, "--steps", 3, "--per-class", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 40
    assert found["steps"] == 3
    assert found["reference"]["images"] == 60
    assert found["extractor"] == "lite0:size=128"
    assert list(values(found)) == ["FD-lite0", "KD-lite0", "precision", "recall", "density", "coverage"]
    assert set(found["classes"]) == {"high", "low"}
    assert values(found)["FD-lite0"] > 2 * values(found, "floor")["FD-lite0"]
    (record,) = read_lines(run / "evaluations.jsonl")
    assert record["metrics"] == found["metrics"]
    assert record["images_seen"] == 16
    with Image.open(run / record["nearest"]) as picture:
        assert picture.width > 500
    again = call_diffkit("evaluate", run, "-n", 20, "--steps", 1, "--device", "cpu")
    assert again.returncode == 0, again.stderr
    assert len(read_lines(run / "evaluations.jsonl")) == 2
    assert "KD-lite0" in again.stdout
    assert "grows as images get fewer" in again.stderr


def test_a_model_of_crops_is_measured_against_crops(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call_diffkit("train", dataset, "-o", run, "--size", 8, "--steps", 1, *TINY).returncode == 0
    done = call_diffkit("evaluate", run, "-n", 20, "--steps", 1, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    train, held_out = open_images(dataset, (8, 8))
    assert (train.shape, held_out.shape) == ((8, 8, 3), (8, 8, 3))  # type: ignore[union-attr]
    whole = open_images(dataset)[0].read(np.arange(3))
    assert np.array_equal(train.read(np.arange(3)), whole[:, 2:10, 2:10])


def test_real_images_against_themselves_are_perfect_copies(dataset: Path, tmp_path: Path) -> None:
    done = call_diffkit("evaluate", dataset, "--data", dataset, "--against", "train", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert values(found)["FD-lite0"] == pytest.approx(0, abs=1e-3)
    assert values(found)["precision"] == 1
    assert found["copying"]["rate"]["value"] == 1
    assert found["copying"]["alarm"] is True
    assert all(each["distance"] < 0.01 for each in found["closest"])
    assert (tmp_path / "out" / "nearest.png").exists()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"] == found["metrics"]


def test_samples_of_a_run_measure_the_same_as_the_run_itself(run: Path, dataset: Path, tmp_path: Path) -> None:
    """The grid and the records that `diffkit sample` writes beside the images are not images of the model."""
    assert call_diffkit("sample", run, "-o", tmp_path / "made", "-n", 30, "--device", "cpu").returncode == 0
    done = call_diffkit("evaluate", tmp_path / "made", "--data", dataset, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 30


def test_any_folder_is_compared_with_any_other(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("other", 1)):
        noise = np.random.default_rng(seed).integers(0, 255, (24, 20, 16), np.uint8)
        (tmp_path / name).mkdir()
        for index, pixels in enumerate(noise):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    done = call_diffkit("evaluate", tmp_path / "one", "--data", tmp_path / "other", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reference"]["images"] == 24
    assert found["copying"]["baseline"] is None


def test_features_of_real_images_are_computed_once(
    dataset: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call_diffkit("evaluate", dataset, "--data", dataset, "--json")
    kept = sorted((own_cache / "diffkit" / "features").iterdir())
    assert len(kept) == 4  # training and held-out, features and pixels
    times = [file.stat().st_mtime_ns for file in kept]
    second = call_diffkit("evaluate", dataset, "--data", dataset, "--json")
    assert second.stdout == first.stdout
    assert [file.stat().st_mtime_ns for file in kept] == times
    damaged = bytearray(kept[0].read_bytes())
    damaged[-9] ^= 4
    kept[0].write_bytes(damaged)
    third = call_diffkit("evaluate", dataset, "--data", dataset, "--json")
    assert third.stdout == first.stdout
    assert kept[0].stat().st_mtime_ns > times[0]


def test_a_changed_image_is_looked_at_again(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"a": 3})
    before = open_images(folder)[0].fingerprint
    assert open_images(folder)[0].fingerprint == before
    Image.new("RGB", (12, 12)).save(folder / "a" / "000.png")
    assert open_images(folder)[0].fingerprint != before


def test_equal_numbers_are_drawn_without_regard_to_the_order_of_files() -> None:
    chosen = spread(1000, 100)
    assert len(set(chosen.tolist())) == 100
    assert abs(chosen.mean() - 500) < 90
    assert np.array_equal(chosen, spread(1000, 100))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{run}", "--against", "holdot"], ExitCode.USAGE, "Did you mean 'holdout'?"),
        (["{run}", "--extractor", "lite1"], ExitCode.USAGE, "No extractor called 'lite1'. Did you mean 'lite0'?"),
        (["{run}", "--extractor", "lite0:size=8"], ExitCode.USAGE, "Its size is 32 or more"),
        (["{run}", "-n", "5"], ExitCode.DATA, "5 made images are too few"),
        (["{run}", "--data", "{large}"], ExitCode.DATA, "16x16 images in colour"),
        (["{run}", "--data", "{gray}"], ExitCode.DATA, "--color gray"),
        (["{run}", "--data", "{others}"], ExitCode.DATA, "a class 'left' that the model does not know"),
        (["{run}", "--data", "{plain}", "--against", "holdout"], ExitCode.DATA, "has no held-out images"),
        (["{run}", "-n", "20", "--downstream"], ExitCode.DATA, "labelled held-out images are too few"),
        (["{plain}", "--data", "{plain}", "--downstream"], ExitCode.DATA, "has no held-out images"),
        (["{plain}"], ExitCode.USAGE, "--data DATA_OR_FOLDER"),
        (["{few}", "--data", "{plain}"], ExitCode.DATA, "3 made images are too few"),
        (["{mixed}", "--data", "{plain}"], ExitCode.DATA, "different sizes"),
        (["{plain}", "--data", "{plain}", "--per-class"], ExitCode.USAGE, "has no classes"),
        (["{others}", "--data", "{labelled}", "--per-class"], ExitCode.DATA, "a class 'left' that the real ones"),
        (["{plain}", "--data", "nowhere"], ExitCode.DATA, "There is no nowhere"),
        (["nowhere", "--data", "{plain}"], ExitCode.DATA, "There is no nowhere"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_next_step(
    run: Path, tmp_path: Path, arguments: list[str], code: ExitCode, words: str
) -> None:
    folders = {"run": run}
    for name, classes, size, mode in (
        ("large", {"high": 20, "low": 5}, (16, 16), "RGB"),
        ("gray", {"high": 20, "low": 5}, (12, 12), "L"),
        ("others", {"left": 21, "right": 20}, (12, 12), "RGB"),
        ("labelled", {"high": 20, "low": 20}, (12, 12), "RGB"),
        ("plain", {".": 25}, (12, 12), "RGB"),
        ("few", {".": 3}, (12, 12), "RGB"),
        ("mixed", {".": 25}, (12, 12), "RGB"),
    ):
        if f"{{{name}}}" not in arguments:
            continue
        (tmp_path / name).mkdir()
        folders[name] = write_images(tmp_path / name / "images", classes, size)
        if mode == "L":
            for file in folders[name].rglob("*.png"):
                Image.open(file).convert("L").save(file)
    if "mixed" in folders:
        Image.new("RGB", (9, 9)).save(folders["mixed"] / "020.png")
    done = call_diffkit("evaluate", *(each.format(**folders) for each in arguments), "--steps", 1, "--device", "cpu")
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.split())
