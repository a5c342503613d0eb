"""Samples that look wrong are noticed, written down, said and charted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from conftest import TINY, call_diffkit
from diffkit.durable import read_lines
from diffkit.engine.appearance import Appearance, problems
from diffkit.engine.store import Store

Pixels = npt.NDArray[np.uint8]


def photos(mean: tuple[float, ...] = (110, 130, 90), spread: float = 50) -> Pixels:
    noise = np.random.default_rng(0).normal(mean, spread, (16, 8, 8, 3))
    return noise.clip(0, 255).astype(np.uint8)


REAL = Appearance.of(photos())


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((16, 8, 8, 3), np.uint8), "black"),
        (np.full((16, 8, 8, 3), 255, np.uint8), "white"),
        (np.full((16, 8, 8, 3), 128, np.uint8), "flat"),
        (np.arange(16, dtype=np.uint8)[:, None, None, None] * np.full((8, 8, 3), 16, np.uint8), "flat"),
        (photos(spread=4), "flat"),
        (photos((110, 250, 90)), "another colour"),
        (255 * (photos() > 110).astype(np.uint8), "at their limits"),
    ],
    ids=["black", "white", "one gray", "a gray each", "hardly any contrast", "green", "burnt out"],
)
def test_what_looks_wrong_is_said(images: Pixels, words: str) -> None:
    (problem,) = problems(Appearance.of(images), REAL)
    assert words in problem


@pytest.mark.parametrize("images", [photos(), photos((120, 120, 100)), photos(spread=70), photos(spread=15)])
def test_images_that_are_only_somewhat_other_are_let_pass(images: Pixels) -> None:
    assert problems(Appearance.of(images), REAL) == []


def test_of_white_strokes_on_black_no_sample_is_too_black() -> None:
    strokes = np.zeros((16, 16, 16, 1), np.uint8)
    strokes[:, 3:12, 7] = 255
    real = Appearance.of(strokes)
    assert problems(real, real) == [] and problems(Appearance.of(strokes[:, ::-1]), real) == []
    assert problems(Appearance.of(np.zeros_like(strokes)), real) == ["The samples are black."]


def test_numbers_are_those_of_numpy() -> None:
    images = photos()
    found = Appearance.of(images)
    values = images.reshape(-1, 3) / 127.5 - 1
    assert found.mean == pytest.approx(values.mean(0)) and found.std == pytest.approx(values.std(0))
    assert found.limits == pytest.approx(np.isin(images, (0, 255)).mean())
    assert Appearance.from_record(found.to_record()) == found


def test_a_training_says_when_its_samples_turn_black_but_not_while_they_are_early(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkit.compose import training as module

    real = Store.open(dataset).gather(np.arange(16))[0]
    shown = iter([real * 0, real * 0, real, real * 0])

    def preview(*_: object) -> tuple[Pixels, Pixels, int]:
        images = next(shown)
        return images, images, 4

    monkeypatch.setattr(module, "preview", preview)
    run = tmp_path / "run"
    command = ("train", dataset, "-o", run, *TINY, "--validate-every", 0, "--preview-every", 16)
    done = call_diffkit(*command, "--steps", 10)  # previews after 2, 4, 6 and 8 steps
    assert done.returncode == 1  # the fifth is one too many for this test
    lines = [line for line in read_lines(run / "metrics.jsonl") if "picture" in line]
    assert [line.get("problems") for line in lines] == [None, None, None, ["The samples are black."]]
    assert done.stderr.count("The samples are black.") == 1
    assert call_diffkit("report", run, "--no-trajectory").returncode == 0
    page = (run / "report.html").read_text()
    assert "crosses: samples that look wrong, the last at 64 images: The samples are black." in page
    shown = iter([real * 0, real * 0])  # what was due then, and at the end
    assert call_diffkit(*command, "--steps", 11).returncode == 0
    assert read_lines(run / "metrics.jsonl")[-1]["problems"] == ["The samples are black."]
