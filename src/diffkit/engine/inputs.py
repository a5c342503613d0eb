"""Images that a user gives a model: to begin with, to be shown, as masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from diffkit import paths
from diffkit.datasets.imagefile import WHITE
from diffkit.engine.decoding import Frame
from diffkit.engine.reading import Readable, examples_at, readable
from diffkit.engine.store import Pixels, Store
from diffkit.errors import DiffkitError, nearest_sibling
from diffkit.interfaces import ImageSpec

SHAPE_TOLERANCE = 0.02
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class Pictures:
    """Some images, read when they are needed: `read(i)` gives uint8 [H, W, C]; `names` tells them apart.

    `sizes`: width and height of the upright originals, where they are files. `notes`: what the user has to know.
    """

    names: Sequence[str]
    read: Callable[[int], Pixels]
    sizes: Sequence[tuple[int, int]] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def open_pictures(path: Path, size: tuple[int, int], channels: int, crop: str | None = None) -> Pictures:
    """An image file, or all images of a folder or zip archive, at the model's size.

    crop: "center" or "pad" for images of another shape; None refuses them. Files of a folder that cannot be decoded are
    skipped, and named in `notes`. Raises DiffkitError where nothing can be used.
    """
    found = _opened(path, size, channels, crop)
    height, width = size
    for name, (across, down) in zip(found.names, found.sizes, strict=True):
        if crop is None and abs((across / down) / (width / height) - 1) > SHAPE_TOLERANCE:
            raise DiffkitError(
                f"{name} is {_by((across, down))}, of another shape than {_by((width, height))}.",
                "Say what to do with it: --crop center or --crop pad.",
            )
    return Pictures(found.names, lambda index: found.read([index])[0], found.sizes, found.skipped(path))


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


def open_masks(path: Path, sources: Pictures, size: tuple[int, int], crop: str | None = None) -> Pictures:
    """Masks for sources, white where the image is to be made anew: a file for all, or one for each by the same name.

    What is transparent in a mask is black. Raises DiffkitError for a mask that cannot be decoded, for one of another
    size than its image, and for one without white.
    """
    masks = _opened(path, size, 1, crop, background=_BLACK)
    if masks.rejected:
        name, reason = masks.rejected[0]
        raise DiffkitError(f"The mask {name} cannot be used: {reason}.", "Save it anew: each image needs its mask.")
    chosen = _of_same_name(path, masks, sources) if len(masks.examples) > 1 or _is_set(path) else [0] * len(sources)
    for name, across_down, mask in zip(sources.names, sources.sizes, chosen, strict=True):
        if across_down != masks.sizes[mask]:
            raise DiffkitError(
                f"The mask {masks.names[mask]} is {_by(masks.sizes[mask])}, its image {name} {_by(across_down)}.",
                "A mask has the size of its image.",
            )
    for mask in sorted(set(chosen)):
        if masks.read([mask])[0].max() < 128:
            raise DiffkitError(
                f"The mask {masks.names[mask]} is all black.",
                "Paint white what is to be made anew; what is transparent counts as black.",
            )
    names = [masks.names[mask] for mask in chosen]
    return Pictures(names, lambda index: masks.read([chosen[index]])[0])


def _of_same_name(path: Path, masks: Readable, sources: Pictures) -> list[int]:
    """For each source the mask whose relative name is the same, whatever the file's type."""
    by_name: dict[str, int] = {}
    for index, name in enumerate(masks.names):
        other = by_name.setdefault(_stem(name), index)
        if other != index:
            raise DiffkitError(f"{masks.names[other]} and {name} in {path} are masks for the same image.", "Keep one.")
    for name in sources.names:
        if _stem(name) not in by_name:
            raise DiffkitError(f"{path} holds no mask for {name}.", "A mask has the name of its image.")
    return [by_name[_stem(name)] for name in sources.names]


def _opened(
    path: Path,
    size: tuple[int, int],
    channels: int,
    crop: str | None,
    background: tuple[int, int, int] = WHITE,
) -> Readable:
    """At the model's size; an image that is an exact fraction of it is enlarged by repeating its pixels."""
    if not paths.exists(path):
        raise DiffkitError(f"There is no {path}.", f"{nearest_sibling(path)}Give an image or a folder of images.")
    height, width = size
    frame = Frame(channels, height, width, crop or "center", background, repeat=True)
    return readable(examples_at(path), frame, path)


def _is_set(path: Path) -> bool:
    """A folder or an archive, whose files belong to images by their names, even where there is only one."""
    return path.is_dir() or path.suffix.lower() == ".zip"


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]} (width x height)"
