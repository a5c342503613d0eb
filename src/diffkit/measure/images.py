"""Sets of images to be measured: a prepared data set, any folder of images, or what a model has just made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from diffkit import paths
from diffkit.core.random import permutation
from diffkit.durable import read_lines
from diffkit.engine.decoding import Frame
from diffkit.engine.reading import examples_at, readable
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
    `fingerprint` changes when the images do, and is empty for images that exist once only; `notes` say what was left
    out.
    """

    path: str
    count: int
    shape: tuple[int, int, int]
    labels: tuple[str | None, ...] | None
    read: Callable[[Indices], Pixels]
    name: Callable[[int], str]
    fingerprint: str = ""
    notes: tuple[str, ...] = ()


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
    """Image files, all of one size; of a folder that `diffkit sample` made, the samples only."""
    examples, notes = _samples(path)
    found = readable(examples or examples_at(path), Frame(channels=3), path, WORKERS)
    width, height = found.sizes[0]
    for name, (across, down) in zip(found.names, found.sizes, strict=True):
        if (across, down) != (width, height):
            raise DiffkitError(
                f"{path} holds images of different sizes: {name} is {down}x{across}, not {height}x{width}.",
                f"Bring them to one size: {command('prepare', path, '--size', f'{height}x{width}')}",
                code=ExitCode.DATA,
            )
    channels = 1 if found.gray else 3
    labels = tuple(example.label for example in found.examples)
    return ImageSet(
        path=str(path),
        count=len(found.examples),
        shape=(height, width, channels),
        labels=labels if any(label is not None for label in labels) else None,
        read=lambda indices: np.stack(found.read(indices.tolist()))[..., :channels],
        name=lambda index: found.names[index],
        fingerprint=_fingerprint(found.examples),
        notes=(*notes, *found.skipped(path)),
    )


def _samples(path: Path) -> tuple[list[Example], tuple[str, ...]]:
    """What samples.jsonl lists, if it is `diffkit sample`'s, and a note on files that are gone."""
    records = read_lines(path / "samples.jsonl") if path.is_dir() else []
    if not all(_is_ours(record) for record in records):
        return [], (f"{path / 'samples.jsonl'} is not of diffkit sample: all images in {path} are measured.",)
    records = list({record["file"]: record for record in records}.values())  # each image once
    examples = [Example(path / record["file"], record["class"], record["file"]) for record in records]
    there = [example for example in examples if isinstance(example.image, Path) and example.image.exists()]
    gone = len(examples) - len(there)
    note = f"{gone} of {len(examples)} images that samples.jsonl lists are not in {path} any more."
    return there, (note,) if gone else ()


def _is_ours(record: object) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("file"), str) or "class" not in record:
        return False
    file = PurePosixPath(record["file"])
    outside = file.is_absolute() or ".." in file.parts
    return not outside and (record["class"] is None or isinstance(record["class"], str))


def _fingerprint(examples: Sequence[Example]) -> str:
    """Names and contents of the files; empty where there are none (inside an archive)."""
    digest = hashlib.sha256()
    for example in examples:
        if not isinstance(example.image, Path):
            return ""
        with example.image.open("rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
        digest.update(f"{example.image.resolve()}\n{example.label}\n{content}\n".encode())
    return digest.hexdigest()
