"""The demo, shortened: every step of it runs and its figures are real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run_diffkit
from diffkit.measure.recognition import _nearest


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(tmp_path: Path) -> None:
    done = run_diffkit("demo", "-o", tmp_path / "demo", "--seconds", 12, "-n", 50, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "demo"
    for command in ("$ diffkit prepare", "$ diffkit train", "$ diffkit sample"):
        assert command in done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["recognised_real"] >= 0.97
    assert figures["samples"] == 50
    assert figures["distance"] > 0.1
    for picture in ("samples/grid.png", "nearest.png"):
        with Image.open(folder / picture) as image:
            assert image.size[0] > 200
    again = run_diffkit("demo", "-o", folder)
    assert again.returncode == 2 and "Nothing is overwritten" in again.stderr


def test_nearest_is_the_euclidean_neighbour() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((20, 30)), rng.random((50, 30))
    index, distance = _nearest(a, b)
    every = np.linalg.norm(a[:, None] - b[None], axis=-1)
    assert (index == every.argmin(1)).all()
    np.testing.assert_allclose(distance, every.min(1), rtol=1e-9)
