"""Sets of images to be measured: a prepared data set, any folder of images, or what a model has just made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffkit import paths
from diffkit.core.random import permutation
from diffkit.datasets.folder import folder
from diffkit.datasets.imagefile import RejectedImage, is_gray, open_image, to_rgb_or_gray
from diffkit.durable import read_lines
from diffkit.engine.store import INDEX_FILE, Store
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example
from diffkit.names import command

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

WORKERS = 2
ORDER_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """Images that can be read again and again.

    `shape` is (height, width, channels) of them all; `labels` one class name (or None) per image, or None for a set
    without classes; `read(indices)` gives uint8 [B, H, W, C]; `names(index)` says where an image comes from;
    `fingerprint` changes when the images do, and is empty for images that exist once only.
    """

    path: str
    count: int
    shape: tuple[int, int, int]
    labels: tuple[str | None, ...] | None
    read: Callable[[Indices], Pixels]
    name: Callable[[int], str]
    fingerprint: str = ""


def places(labels: Sequence[str | None], label: str) -> list[int]:
    """Where this label stands."""
    return [index for index, each in enumerate(labels) if each == label]


def spread(count: int, wanted: int) -> Indices:
    """`wanted` indices below `count`, drawn once and for all: the same at every call, and free of the files' order."""
    if wanted >= count:
        return np.arange(count)
    chosen: Indices = permutation(ORDER_SEED, 0, count)[:wanted].numpy()
    return np.sort(chosen)


def open_images(path: Path, crop: tuple[int, int] | None = None) -> tuple[ImageSet, ImageSet | None]:
    """The images at `path`, and those that were held out (None = there are none, or it is no prepared set).

    `crop`: height and width of the centre to be taken from larger prepared images, as training takes crops of them.
    Raises DiffkitError where there is nothing to read, or where sizes differ.
    """
    if paths.exists(path / INDEX_FILE):
        store = Store.open(path)
        size = (store.spec.height, store.spec.width) if crop is None else crop
        return _prepared(store, "train", size), _prepared(store, "holdout", size) if store.holdout_count else None
    return _loose(path), None


def made(pixels: Pixels, labels: Sequence[str | None] | None, path: str) -> ImageSet:
    """Images in memory, uint8 [N, H, W, C]."""
    return ImageSet(
        path=path,
        count=len(pixels),
        shape=pixels.shape[1:],
        labels=None if labels is None else tuple(labels),
        read=lambda indices: pixels[indices],
        name=lambda index: f"sample {index}",
    )


def clipped(images: ImageSet, most: int = 1000) -> float:
    """The share of values that are 0 or 255, in up to `most` images spread over the set."""
    chosen = np.unique(np.linspace(0, images.count - 1, min(most, images.count)).astype(np.int64))
    extremes, values = 0, 0
    for start in range(0, len(chosen), 64):
        pixels = images.read(chosen[start : start + 64])
        extremes += int(((pixels == 0) | (pixels == 255)).sum())
        values += pixels.size
    return extremes / values


def check_shapes(one: str, shape: tuple[int, int, int], other: str, other_shape: tuple[int, int, int]) -> None:
    """Raises DiffkitError unless both hold images of one size, in colour or in gray."""
    if shape == other_shape:
        return
    height, width, channels = other_shape
    option = f"--size {height}x{width}" if shape[:2] != (height, width) else ""
    option = option or f"--color {'gray' if channels == 1 else 'color'}"
    raise DiffkitError(
        f"These cannot be compared: {one} holds {_words(shape)}, {other} {_words(other_shape)}.",
        f"Bring them to one kind: diffkit prepare FOLDER {option}.",
        code=ExitCode.DATA,
    )


def _words(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]}x{shape[1]} images in {'gray' if shape[2] == 1 else 'colour'}"


def _prepared(store: Store, part: str, size: tuple[int, int]) -> ImageSet:
    spec, (height, width) = store.spec, size
    top, left = (spec.height - height) // 2, (spec.width - width) // 2
    count = store.count if part == "train" else store.holdout_count
    codes = store.gather(np.arange(count), part)[1]
    labels = None if codes is None else tuple(spec.classes[code] if code >= 0 else None for code in codes.tolist())
    names: list[str] = []

    def name(index: int) -> str:
        if not names:
            names.extend(record["id"] for record in read_lines(store.path / "examples.jsonl") if record["part"] == part)
        return names[index] if index < len(names) else f"{part} image {index}"

    return ImageSet(
        path=str(store.path),
        count=count,
        shape=(height, width, spec.channels),
        labels=labels,
        read=lambda indices: store.gather(indices, part)[0][:, top : top + height, left : left + width],
        name=name,
        fingerprint=f"{store.fingerprint}-{part}-{height}x{width}",
    )


def _loose(path: Path) -> ImageSet:
    """A folder of image files, all of one size; of a folder that `diffkit sample` made, the samples only."""
    records = read_lines(path / "samples.jsonl") if path.is_dir() else []
    examples = [Example(path / record["file"], record["class"], record["file"]) for record in records]
    examples = examples or list(folder(str(path)))
    channels, size = _head(path, examples)
    labelled = any(example.label is not None for example in examples)
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="diffkit-read")

    def read(indices: Indices) -> Pixels:
        wanted = [examples[index] for index in indices.tolist()]
        return np.stack(list(pool.map(partial(_pixels, size=size, channels=channels, folder=path), wanted)))

    return ImageSet(
        path=str(path),
        count=len(examples),
        shape=(*size, channels),
        labels=tuple(example.label for example in examples) if labelled else None,
        read=read,
        name=lambda index: str(examples[index].id),
        fingerprint=_fingerprint(examples),
    )


def _head(path: Path, examples: list[Example]) -> tuple[int, tuple[int, int]]:
    """Channels and (height, width) of the first image; colour if any of the first hundred has it."""
    for number, example in enumerate(examples[:100]):
        try:
            with _opened(example.image) as image:
                gray = is_gray(image)
                if number == 0:
                    size = image.height, image.width
        except RejectedImage as error:
            raise _unreadable(example, path, error) from error
        if not gray:
            return 3, size
    return 1, size


def _pixels(example: Example, size: tuple[int, int], channels: int, folder: Path) -> Pixels:
    try:
        with _opened(example.image) as image:
            found = np.asarray(to_rgb_or_gray(image, channels))
    except RejectedImage as error:
        raise _unreadable(example, folder, error) from error
    if found.shape[:2] != size:
        height, width = found.shape[:2]
        raise DiffkitError(
            f"{folder} holds images of different sizes: {example.id} is {height}x{width}, not {size[0]}x{size[1]}.",
            f"Bring them to one size: {command('prepare', folder, '--size', f'{size[0]}x{size[1]}')}",
            code=ExitCode.DATA,
        )
    return found.reshape(*size, channels)


def _opened(image: Any) -> Image.Image:
    return open_image(image) if isinstance(image, Path) else image()


def _unreadable(example: Example, folder: Path, error: RejectedImage) -> DiffkitError:
    return DiffkitError(
        f"{example.id} in {folder} cannot be read: {error.reason}.",
        "Remove it, or let diffkit prepare sort out what is usable.",
        code=ExitCode.DATA,
    )


def _fingerprint(examples: list[Example]) -> str:
    """Names, sizes and times of the files; empty where there are none (inside an archive)."""
    digest = hashlib.sha256()
    for example in examples:
        if not isinstance(example.image, Path):
            return ""
        status = example.image.stat()
        digest.update(f"{example.image.resolve()}\n{example.label}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()
