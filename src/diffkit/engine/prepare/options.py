"""How images become rows of a prepared data set, and what is told on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from diffkit.datasets.deep import WHITE_LEVEL
from diffkit.datasets.imagefile import WHITE, Color
from diffkit.errors import DiffkitError, did_you_mean
from diffkit.interfaces import Account, ImageSpec

CROPS = ("center", "random", "pad")
LARGEST = 8192


@dataclass(frozen=True)
class PrepareOptions:
    """How images become rows of the data set.

    height, width: pixels. crop: "center", "random" (a place fixed by the example's id) or "pad". channels: 3, 1, or
    0 = gray if the first 64 examples all are, else colour. background: RGB under transparency and around padding.
    holdout: fraction kept from training, chosen by content. workers: how many images are decoded at once, 0 = one
    per core; without influence on the result. white_level: the sample of 16-bit images that means white. min_side:
    shorter images are rejected. max_rejected: fraction above which nothing is written. shard_images: images per
    file, 0 = as many as fit into 1 GiB. keep_split: a split that the source has takes the place of `holdout`.
    strict: write nothing if anything at all does not fit.
    """

    height: int = 128
    width: int = 128
    crop: str = "center"
    channels: int = 3
    background: Color = WHITE
    holdout: float = 0.05
    workers: int = 0
    min_side: int = 0
    max_rejected: float = 0.05
    shard_images: int = 0
    keep_split: bool = True
    strict: bool = False
    white_level: int = WHITE_LEVEL

    def __post_init__(self) -> None:
        _require(self.height >= 1 and self.width >= 1, f"The size {self.height}x{self.width} has no pixels.")
        _require(
            self.crop in CROPS,
            f"crop cannot be '{self.crop}'.",
            f"{did_you_mean(self.crop, CROPS)}Choose one of {', '.join(CROPS)}.",
        )
        _require(self.channels in (0, 1, 3), f"channels cannot be {self.channels}.", "Choose 3, 1 or 0 (auto).")
        _require(0 <= self.holdout < 1, f"holdout must be at least 0 and below 1, not {self.holdout}.")
        _require(0 <= self.max_rejected <= 1, f"max_rejected must lie in 0 to 1, not {self.max_rejected}.")
        _require(
            len(self.background) == 3 and all(0 <= value <= 255 for value in self.background),
            f"background must be three numbers from 0 to 255, not {self.background}.",
        )
        _require(
            max(self.height, self.width) <= LARGEST,
            f"The size {self.height}x{self.width} is larger than diffkit can prepare.",
            f"The most is {LARGEST}x{LARGEST}.",
        )
        _require(
            1 <= self.white_level <= WHITE_LEVEL, f"white_level must lie in 1 to {WHITE_LEVEL}, not {self.white_level}."
        )
        for name in ("workers", "min_side", "shard_images"):
            _require(getattr(self, name) >= 0, f"{name.replace('_', '-')} cannot be negative.")


@dataclass(frozen=True)
class Prepared:
    """One more example is through. `done` and `rejected` count so far; `reason` is empty if it was stored."""

    done: int
    rejected: int
    id: str
    reason: str = ""


@dataclass(frozen=True)
class Finished:
    """The data set is in place. Counts of images; `reasons` counts the rejected by kind of reason.

    `account` is that of the source, with what came to light on the way.
    `warnings`: what is strange about the pixels as a whole, a sentence or two each.
    """

    path: Path
    spec: ImageSpec
    count: int
    holdout_count: int
    rejected: int
    enlarged: int
    duplicates: int
    unlabelled: int
    class_counts: dict[str, int]
    reasons: dict[str, int]
    account: Account
    warnings: tuple[str, ...] = ()


Event: TypeAlias = "Prepared | Finished"


def plural(count: int, kind: str) -> str:
    """ "1 row without an image", "3 rows without an image"."""
    noun, _, rest = kind.partition(" ")
    many = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else many} {rest}".rstrip()


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise DiffkitError(message, hint)
