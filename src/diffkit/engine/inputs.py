"""Images that a user gives a model: to begin with, to be shown, as masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffkit import paths
from diffkit.datasets.imagefile import WHITE, RejectedImage, is_image_name, open_image, rejecting, to_rgb_or_gray
from diffkit.engine.fitting import fit
from diffkit.engine.store import Pixels, Store
from diffkit.errors import DiffkitError, nearest_sibling
from diffkit.interfaces import ImageSpec

SHAPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Pictures:
    """Some images, read when they are needed: `read(i)` gives uint8 [H, W, C]; `names` tells them apart."""

    names: Sequence[str]
    read: Callable[[int], Pixels]

    def __len__(self) -> int:
        return len(self.names)


def open_pictures(path: Path, size: tuple[int, int], channels: int, crop: str | None = None) -> Pictures:
    """An image file, or all images of a folder sorted by name, at the model's size.

    crop: "center" or "pad" for images of another shape; None refuses them. Raises DiffkitError for what cannot be read.
    """
    files = _image_files(path)

    def read(index: int) -> Pixels:
        return _fitted(files[index], size, channels, crop)

    first = read(0)
    assert first.shape == (*size, channels)
    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    return Pictures(names, read)


def stored_pictures(store: Store, spec: ImageSpec) -> Pictures:
    """What a task is shown of a prepared data set to look at its model: held-out images where there are some."""
    part, count = ("holdout", store.holdout_count) if store.holdout_count else ("train", store.count)
    top, left = (store.spec.height - spec.height) // 2, (store.spec.width - spec.width) // 2
    kind = "inputs" if store.spec.image_channels else "images"

    def read(index: int) -> Pixels:
        rows = store.column(kind, np.array([index]), part)
        assert rows is not None
        return np.ascontiguousarray(rows[0, top : top + spec.height, left : left + spec.width])

    return Pictures([f"{part} {index}" for index in range(count)], read)


def open_masks(path: Path, sources: Path, size: tuple[int, int], crop: str | None = None) -> Pictures:
    """Masks for sources, white where the image is to be made anew: one for all, or one for each by the same name.

    Raises DiffkitError for a mask of another size than its image, and for one without white.
    """
    images, masks = _image_files(sources), _image_files(path)
    by_stem = {mask.stem: mask for mask in masks}
    chosen = [by_stem.get(image.stem) if len(masks) > 1 else masks[0] for image in images]
    for image, mask in zip(images, chosen, strict=True):
        if mask is None:
            raise DiffkitError(f"{path} holds no mask for {image.name}.", "A mask has the name of its image.")
        try:
            with rejecting(), open_image(image) as one, open_image(mask) as other:
                sizes = one.size, other.size
                white = other.convert("L").getextrema()[1]
        except RejectedImage as error:
            raise DiffkitError(f"{mask} cannot be used: {error.reason}.") from error
        if sizes[0] != sizes[1]:
            raise DiffkitError(
                f"The mask {mask.name} is {_by(sizes[1])}, its image {image.name} {_by(sizes[0])}.",
                "A mask has the size of its image.",
            )
        if not isinstance(white, int) or white < 128:
            raise DiffkitError(f"The mask {mask.name} is all black.", "White marks what is to be made anew.")

    def read(index: int) -> Pixels:
        mask = chosen[index]
        assert mask is not None
        return _fitted(mask, size, 1, crop)

    return Pictures([mask.name for mask in chosen if mask is not None], read)


def _image_files(path: Path) -> list[Path]:
    if paths.is_file(path):
        return [path]
    if not paths.is_folder(path):
        raise DiffkitError(f"There is no {path}.", f"{nearest_sibling(path)}Give an image or a folder of images.")
    files = sorted(file for file in path.rglob("*") if is_image_name(file.name) and not file.name.startswith("."))
    files = [file for file in files if file.name != "grid.png" or not (file.parent / "samples.jsonl").exists()]
    if not files:
        raise DiffkitError(f"{path} holds no images.", "Give an image or a folder of images.")
    return files


def _fitted(file: Path, size: tuple[int, int], channels: int, crop: str | None) -> Pixels:
    """An image at the model's size; one that is an exact fraction of it is enlarged by repeating its pixels."""
    height, width = size
    try:
        with rejecting(), open_image(file) as image:
            across, down = image.size
            if height % down == 0 and width % across == 0 and height // down == width // across:
                small = np.asarray(to_rgb_or_gray(image, channels, WHITE)).reshape(down, across, channels)
                return small.repeat(height // down, axis=0).repeat(width // across, axis=1)
            pixels, across, down = fit(image, height, width, channels, crop or "center", WHITE, file.name)
    except RejectedImage as error:
        raise DiffkitError(f"{file} cannot be used: {error.reason}.") from error
    if crop is None and abs((across / down) / (width / height) - 1) > SHAPE_TOLERANCE:
        raise DiffkitError(
            f"{file.name} is {_by((across, down))}, of another shape than {_by((width, height))}.",
            "Say what to do with it: --crop center or --crop pad.",
        )
    return pixels


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (width x height)"
