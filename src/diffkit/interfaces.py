"""The contracts between parts: plain records, and the shape of each kind of function.

A part is a function. Its keyword-only parameters are its options: names, types and defaults are read from its
signature for validation, documentation and the record that a run keeps. Nothing here imports torch at run time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import Tensor, nn

    ImageLike: TypeAlias = Image.Image | npt.NDArray[np.uint8] | Path | Callable[[], Image.Image]


class Attribute(NamedTuple):
    """A number that images are labelled with, and the least and the greatest of those in training."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class ImageSpec:
    """What a prepared data set holds, and so what a backbone is built for.

    `height` and `width` in pixels, `channels` 1 (gray) or 3 (colour); `classes` are the label names and `attributes`
    the numbers beside them, both empty when the set is unconditional; `image_channels` counts the channels of a
    conditioning image, or of the paired inputs that a data set holds (0 = none).
    """

    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    image_channels: int = 0
    dtype: str = "uint8"
    attributes: tuple[Attribute, ...] = ()

    @property
    def label_width(self) -> int:
        """K of the label tensor [B, K]: a class is one-hot, an attribute its value and its presence; zeros = none."""
        return len(self.classes) + 2 * len(self.attributes)

    def __str__(self) -> str:
        kinds = [f"{len(self.classes)} classes"] if self.classes else []
        kinds += [f"{len(self.attributes)} attributes"] if self.attributes else []
        kinds += ["image to image"] if self.image_channels else []
        return f"{self.height}x{self.width}x{self.channels}, {', '.join(kinds) or 'unconditional'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; attributes only where there are some."""
        return {
            "channels": self.channels,
            "height": self.height,
            "width": self.width,
            "classes": list(self.classes),
            "image_channels": self.image_channels,
            "dtype": self.dtype,
            **({"attributes": [list(attribute) for attribute in self.attributes]} if self.attributes else {}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageSpec:
        """The inverse of `to_dict`. Raises ValueError for values of the wrong type or out of range."""
        from pydantic import TypeAdapter

        spec: ImageSpec = TypeAdapter(cls).validate_json(json.dumps(values), strict=True)
        if min(spec.channels, spec.height, spec.width, spec.image_channels + 1) < 1 or spec.dtype != "uint8":
            raise ValueError(f"{spec} are not images")
        for names in (spec.classes, [attribute.name for attribute in spec.attributes]):
            if len(set(names)) < len(names):
                raise ValueError("two labels have one name")
        if not all(math.isfinite(a.low) and math.isfinite(a.high) and a.low < a.high for a in spec.attributes):
            raise ValueError("an attribute has no range")
        return spec


@dataclass(frozen=True)
class Example:
    """One image from a dataset source.

    `image`: a Pillow image, a uint8 array [H, W], [H, W, 1] or [H, W, 3], or, so that it is read later, in a
    worker, the path of an image file or a function that returns the Pillow image. `label`: a class name, or None.
    `id`: stable and unique within the source (default: its position). `input`: a paired input image for
    image-to-image training. `attributes`: numbers by name; one that is absent or NaN is unknown. `part`: "train" or
    "holdout" where the source is split already, or None.
    """

    image: ImageLike
    label: str | None = None
    id: str | None = None
    input: ImageLike | None = None
    attributes: Mapping[str, float] | None = None
    part: str | None = None


@dataclass
class Account:
    """What a source says beside its examples: printed, kept in dataset.json, and judged by `prepare --strict`.

    `remarks`: sentences on how the place was understood. `problems`: what did not fit, by kind (a noun, singular), each
    with the names. `skipped`: what looks like images and is not among the examples, as name and reason. `record`: plain
    values to keep. Complete when the examples are exhausted.
    """

    remarks: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


class Listing(Iterator[Example]):
    """Examples with an account of them; a dataset source may return one instead of a plain iterator."""

    def __init__(self, examples: Iterable[Example], account: Account) -> None:
        self._examples = iter(examples)
        self.account = account

    def __next__(self) -> Example:
        return next(self._examples)


def account_of(examples: Iterable[Example]) -> Account:
    """The account that comes with these examples; an empty one if none does."""
    return examples.account if isinstance(examples, Listing) else Account()


class Coefficients(NamedTuple):
    """A prediction type at noise levels s: `clean = skip * x + out * network(inp * x, log(s) / 4)`."""

    skip: Tensor
    out: Tensor
    inp: Tensor


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a training when it starts: the run's folder, a name for it, all its settings.

    `id` is the same whenever this run goes on, and another's for any other run: trackers can go on with it too.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    id: str


Schedule: TypeAlias = "Callable[..., Tensor]"
"""Noise schedule `(t, *, options) -> s`: float64 in (0, 1) to a noise-to-signal ratio, increasing, > 0."""

Prediction: TypeAlias = "Callable[..., Coefficients]"
"""What the network estimates: `(s, *, options) -> Coefficients`, float64 tensors of the shape of s."""

Denoise: TypeAlias = "Callable[[Tensor, float | Tensor], Tensor]"
"""`denoise(x [B, C, H, W], s) -> the estimate of the clean images [B, C, H, W]`; s > 0, a float, or float64 [B] on the
CPU where a sampler takes every image along at its own pace."""

Noise: TypeAlias = "Callable[[float, float], Tensor]"
"""`noise(s, s_next) -> [B, C, H, W]` of unit variance, keyed by image and by the interval's position."""


Sampler: TypeAlias = "Callable[..., Iterator[Tensor]]"
"""`(denoise, x, sigmas, noise, *, options)`: yields x after each step down the list of noise levels."""

Backbone: TypeAlias = "Callable[..., nn.Module]"
"""`(spec, *, options) -> nn.Module` with `forward(x, c_noise, **condition) -> [B, C, H, W]`."""

Weighting: TypeAlias = "Callable[..., Tensor]"
"""`(s, density, *, options) -> weights`: of the squared error of the clean estimate, float64 like s."""

Task: TypeAlias = "Callable[..., Tensor]"
"""`(images [B, C, H, W], draw, mask, *, options) -> conditioning image [B, C', H, W]`."""

DatasetSource: TypeAlias = "Callable[..., Iterator[Example]]"
"""`(path, *, options) -> Iterator[Example]`, in an order that does not change from call to call."""

Extractor: TypeAlias = "Callable[..., nn.Module]"
"""Feature extractor `(*, options) -> nn.Module` with `forward(images uint8 [B, 3, H, W]) -> float32 [B, D]`."""

Log: TypeAlias = "Callable[[int, Mapping[str, float], Mapping[str, Path]], None]"
"""`log(images_seen, figures by name, pictures by name)`."""

Tracker: TypeAlias = "Callable[..., AbstractContextManager[Log]]"
"""`(run: TrackedRun, *, options)`: a context manager that gives a `Log` while the training lasts."""
