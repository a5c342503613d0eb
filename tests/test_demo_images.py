"""The demo's images are there without a download: real PNG files in class folders, with a margin."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffkit.datasets.demo import DIGITS, write_demo_images
from diffkit.errors import DiffkitError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("demo") / "deep" / "digits"
    return folder, write_demo_images(folder)


def test_every_class_folder_holds_as_many_files_as_reported(written: tuple[Path, dict[str, int]]) -> None:
    folder, counts = written
    assert list(counts) == list(DIGITS)
    assert sum(counts.values()) == 1797
    assert min(counts.values()) > 170
    assert {path.name: len(list(path.glob("*.png"))) for path in folder.iterdir()} == counts


def test_images_are_gray_png_files_with_a_black_margin(written: tuple[Path, dict[str, int]]) -> None:
    for path in sorted(written[0].rglob("*.png"))[::100]:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (16, 16))
            pixels = np.asarray(image)
        assert pixels[2:14, 2:14].max() > 150
        frame = pixels.copy()
        frame[2:14, 2:14] = 0
        assert frame.max() == 0


def test_a_zero_has_a_hole_and_a_one_has_none(written: tuple[Path, dict[str, int]]) -> None:
    def middle(name: str) -> float:
        files = sorted((written[0] / name).glob("*.png"))
        return float(np.mean([np.asarray(Image.open(path))[7:9, 7:9].mean() for path in files]))

    assert middle("0") < 40 < 150 < middle("1")


def test_another_size_and_an_empty_folder(tmp_path: Path) -> None:
    assert sum(write_demo_images(tmp_path, size=8).values()) == 1797
    with Image.open(next(tmp_path.rglob("*.png"))) as image:
        assert image.size == (8, 8)
    assert not list(tmp_path.parent.glob(".*.tmp"))


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DiffkitError, match="not an empty folder"):
        write_demo_images(tmp_path)
    with pytest.raises(DiffkitError, match="not an empty folder"):
        write_demo_images(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_too_small_a_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffkitError, match="too small"):
        write_demo_images(tmp_path / "new", size=4)


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DiffkitError, match=r"pip install 'diffkit\[demo\]'"):
        write_demo_images(tmp_path / "new")
    assert not (tmp_path / "new").exists()
