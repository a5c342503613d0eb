"""torchvision's datasets as a source, on files in torchvision's own formats."""

from __future__ import annotations

import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from diffkit.datasets.imagefile import RejectedImage
from diffkit.datasets.torchvision import torchvision
from diffkit.errors import DiffkitError, ExitCode


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Fashion-MNIST as its authors publish it, but tiny: four training and two test images."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(3).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for name, part, labels in (("train", images[:4], [9, 0, 3, 0]), ("t10k", images[4:], [1, 2])):
        write_idx(raw / f"{name}-images-idx3-ubyte", part)
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.array(labels, np.uint8))
    return tmp_path, images


def test_fashion_mnist_files_give_images_and_class_names(fashion: tuple[Path, np.ndarray]) -> None:
    root, images = fashion
    examples = list(torchvision("FashionMNIST", root=str(root)))
    assert [example.label for example in examples] == ["Ankle boot", "T-shirt/top", "Dress", "T-shirt/top"]
    assert len({example.id for example in examples}) == 4
    for example, expected in zip(examples, images, strict=False):
        assert isinstance(example.image, Image.Image)
        assert np.array_equal(np.asarray(example.image), expected)


def test_the_split_is_translated_to_the_class_own_words(fashion: tuple[Path, np.ndarray]) -> None:
    root, _ = fashion
    labels = [example.label for example in torchvision("fashionmnist", root=str(root), split="test")]
    assert labels == ["Trouser", "Pullover"]
    with pytest.raises(DiffkitError, match="no split 'val'"):
        torchvision("FashionMNIST", root=str(root), split="val")


def test_absent_files_say_where_they_are_looked_for_and_how_to_fetch_them(tmp_path: Path) -> None:
    for name in ("CIFAR10", "FashionMNIST", "Flowers102"):
        with pytest.raises(DiffkitError) as caught:
            torchvision(name, root=str(tmp_path))
        assert caught.value.code == ExitCode.DATA
        assert str(tmp_path) in str(caught.value) and "download=true" in str(caught.value)


def test_a_failed_download_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        print("Downloading http://example.org/x")
        raise URLError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(DiffkitError, match="no route to host") as caught:
        torchvision("CIFAR10", root=str(tmp_path), download=True)
    assert caught.value.code == ExitCode.MACHINE


def test_standard_output_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: object) -> None:
        print("Downloading")
        raise URLError("no")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(DiffkitError):
        torchvision("CIFAR10", root=str(tmp_path), download=True)
    assert capsys.readouterr() == ("", "Downloading\n")


@pytest.mark.parametrize(("name", "near"), [("CIFAR11", "CIFAR10"), ("fashionmist", "FashionMNIST")])
def test_an_unknown_dataset_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(DiffkitError, match=f"Did you mean '{near}'"):
        torchvision(name)


def test_fake_data_without_root_or_split_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "FakeData", five_fakes())
    examples = list(torchvision("FakeData"))
    assert len(examples) == 5
    assert all(example.label is not None and example.label.isdigit() for example in examples)
    with pytest.raises(DiffkitError, match="not divided into splits"):
        torchvision("FakeData", split="test")


def five_fakes() -> type:
    class FakeData(datasets.FakeData):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(size=5, image_size=(3, 8, 8))

    return FakeData


def test_arguments_that_a_class_insists_on_are_an_error_not_a_crash() -> None:
    with pytest.raises(DiffkitError, match="torchvision refuses"):
        torchvision("CocoDetection")


class Odd:
    """Targets of all kinds, and one image that cannot be read."""

    classes = (("tench", "Tinca"), "shark")

    def __init__(self, root: str) -> None:
        self.targets = [0, np.int64(1), 7, {"boxes": []}, 0.5, None]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, object]:
        if self.targets[index] is None:
            raise OSError("cannot\nread it")
        return Image.new("L", (2, 2)), self.targets[index]


def test_only_integer_targets_become_labels_and_bad_items_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Odd)
    examples = list(torchvision("CIFAR10"))
    assert [example.label for example in examples] == ["tench, Tinca", "shark", "7", None, None, None]
    image = examples[-1].image
    assert callable(image)
    with pytest.raises(RejectedImage, match="damaged: cannot read it"):
        image()


def test_a_dataset_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Odd, "__getitem__", lambda self, index: {"image": 1})
    monkeypatch.setattr(datasets, "CIFAR10", Odd)
    with pytest.raises(DiffkitError, match="pairs of image and class"):
        list(torchvision("CIFAR10"))
