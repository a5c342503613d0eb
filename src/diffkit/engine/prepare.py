"""From examples to a prepared data set: decoded in threads, written in source order, whole or not at all."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from diffkit import durable
from diffkit.datasets.imagefile import (
    WHITE,
    Color,
    RejectedImage,
    is_gray,
    open_image,
    printable,
    rejecting,
)
from diffkit.engine.fitting import fit
from diffkit.engine.shards import LineWriter, Moments, ShardWriter
from diffkit.engine.store import FORMAT, INDEX_FILE, VERSION, Pixels
from diffkit.errors import DiffkitError, ExitCode, did_you_mean
from diffkit.interfaces import Example, ImageSpec

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

CROPS = ("center", "random", "pad")
_AUTO_LOOK = 64
_SHARD_BYTES = 2**30
_LARGEST = 8192


@dataclass(frozen=True)
class PrepareOptions:
    """How images become rows of the data set.

    height, width: pixels. crop: "center", "random" (a place fixed by the example's id) or "pad". channels: 3,
    1, or 0 = gray if the first 64 examples all are, else colour. background: RGB under transparency and
    around padding. holdout: fraction kept from training, chosen by content. workers: threads, 0 = one per
    core; without influence on the result. min_side: shorter images are rejected. max_rejected: fraction above
    which nothing is written. shard_images: images per file, 0 = as many as fit into 1 GiB.
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
            max(self.height, self.width) <= _LARGEST,
            f"The size {self.height}x{self.width} is larger than diffkit can prepare.",
            f"The most is {_LARGEST}x{_LARGEST}.",
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
    """The data set is in place. Counts of images; `reasons` counts the rejected by kind of reason."""

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


Event: TypeAlias = "Prepared | Finished"


@dataclass(frozen=True)
class _Row:
    """What a worker makes of one example: pixels, or the reason why not."""

    id: str
    path: str
    label: str | None
    reason: str = ""
    pixels: Pixels | None = None
    width: int = 0
    height: int = 0
    sha256: str = ""


def prepare(examples: Iterable[Example], out: Path, options: PrepareOptions, *, source: str = "") -> Iterator[Event]:
    """Write the prepared data set `out`, yielding `Prepared` per example and `Finished` last.

    The result depends on the examples and the options alone, byte for byte, never on the number of workers.
    Until `Finished`, nothing exists at `out`; an abandoned or failed run leaves nothing behind. Raises
    DiffkitError: `out` is there already, no usable image, too many rejected, nothing left for training, or no
    room on the disk.
    """
    if not durable.vacant(out):
        raise DiffkitError(f"{out} exists already.", "Choose another name with -o, or remove it first.")
    examples, channels = _decide_channels(examples, options)
    with durable.new_folder(out) as folder:
        writer = _Writer(folder, options, channels)
        try:
            for row in _decoded(examples, options, channels):
                writer.add(row)
                yield Prepared(writer.done, writer.rejected, row.id, row.reason)
            finished = writer.finish(out, source)
        finally:
            writer.close()
    yield finished


def _decide_channels(examples: Iterable[Example], options: PrepareOptions) -> tuple[Iterable[Example], int]:
    """The number of channels, and the examples with those looked at put back in front."""
    if options.channels:
        return examples, options.channels
    source = iter(examples)
    first = list(islice(source, _AUTO_LOOK))
    known = [gray for gray in map(_looks_gray, first) if gray is not None]
    return chain(first, source), 1 if known and all(known) else 3


def _looks_gray(example: Example) -> bool | None:
    """From the header alone; None where there is no usable image."""
    try:
        with rejecting(), _opened(example.image) as image:
            return is_gray(image)
    except RejectedImage:
        return None


def _decoded(examples: Iterable[Example], options: PrepareOptions, channels: int) -> Iterator[_Row]:
    """Rows in the order of the examples; a bounded number of them is under way at any time."""
    workers = options.workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="diffkit-prepare")
    under_way: deque[Future[_Row]] = deque()
    try:
        for index, example in enumerate(examples):
            under_way.append(pool.submit(_decode, index, example, options, channels))
            if len(under_way) > 4 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(index: int, example: Example, options: PrepareOptions, channels: int) -> _Row:
    """In a worker: one example to its pixels."""
    identity = str(index) if example.id is None else example.id
    path = printable(str(example.image)) if isinstance(example.image, Path) else identity
    if example.input is not None:
        raise DiffkitError("Paired input images cannot be prepared yet.", "Leave `input` out of the examples.")
    try:
        with rejecting(), _opened(example.image) as image:
            if min(image.size) < options.min_side:
                raise RejectedImage(f"too small: {image.size[0]}x{image.size[1]}")
            if options.channels == 0 and channels == 1 and not is_gray(image):
                raise _found_colour(identity)
            pixels, width, height = fit(
                image, options.height, options.width, channels, options.crop, options.background, identity
            )
    except RejectedImage as error:
        return _Row(identity, path, example.label, error.reason)
    digest = sha256(pixels.tobytes()).hexdigest()
    return _Row(identity, path, example.label, "", pixels, width, height, digest)


def _opened(image: ImageLike) -> AbstractContextManager[Image.Image]:
    """Whatever a source gave, as a Pillow image; `with` closes it if it was opened here."""
    if isinstance(image, Path):
        return open_image(image)
    if isinstance(image, Image.Image):
        return nullcontext(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (1,), (3,)) or image.size == 0:
            raise RejectedImage(f"not an image: an array {image.dtype} {image.shape}")
        return nullcontext(Image.fromarray(image if image.shape[2:] != (1,) else image[..., 0]))
    return image()


def _found_colour(identity: str) -> DiffkitError:
    return DiffkitError(
        f"The first {_AUTO_LOOK} images are gray, but {identity} is not.",
        "Say which it shall be: --color color or --color gray.",
        code=ExitCode.DATA,
    )


@dataclass
class _Writer:
    """The folder that grows, and what is counted on the way."""

    folder: Path
    options: PrepareOptions
    channels: int
    rejected: int = 0
    enlarged: int = 0
    duplicates: int = 0
    labels: dict[str, list[str | None]] = field(default_factory=lambda: {"train": [], "holdout": []})
    reasons: Counter[str] = field(default_factory=Counter)
    first_rejected: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        options = self.options
        row = (options.height, options.width, self.channels)
        per_shard = options.shard_images or max(1, _SHARD_BYTES // (row[0] * row[1] * row[2]))
        self.parts = {part: ShardWriter(self.folder, part, row, per_shard) for part in self.labels}
        self.moments = Moments(self.channels)
        self.examples_file = LineWriter(self.folder / "examples.jsonl")
        self.rejected_file = LineWriter(self.folder / "rejected.jsonl")

    @property
    def stored(self) -> int:
        """Images written, of both parts."""
        return sum(part.count for part in self.parts.values())

    @property
    def done(self) -> int:
        """Examples seen."""
        return self.stored + self.rejected

    def add(self, row: _Row) -> None:
        """Store a row, or note why it is not stored."""
        if row.pixels is None:
            self._reject(row)
            return
        part = "holdout" if int(row.sha256[:16], 16) / 2**64 < self.options.holdout else "train"
        self.parts[part].add(row.pixels)
        self.labels[part].append(row.label)
        if part == "train":
            self.moments.add(row.pixels)
        key = bytes.fromhex(row.sha256[:32])
        self.duplicates += key in self.seen
        self.seen.add(key)
        self.enlarged += self._was_enlarged(row)
        self.examples_file.add(
            {
                "id": row.id,
                "path": row.path,
                "width": row.width,
                "height": row.height,
                "sha256": row.sha256,
                "label": row.label,
                "part": part,
            }
        )

    def finish(self, out: Path, source: str) -> Finished:
        """Labels, hashes and dataset.json; raises DiffkitError where the set is of no use."""
        self._check()
        classes = _classes(self.labels["train"])
        codes = {name: code for code, name in enumerate(classes)}
        for name, part in self.parts.items():
            part.finish_shard()
            if classes:
                part.write_labels(
                    np.array([-1 if label is None else codes.get(label, -1) for label in self.labels[name]], np.int64)
                )
        self.examples_file.finish()
        self.rejected_file.finish()
        options = self.options
        finished = Finished(
            path=out,
            spec=ImageSpec(self.channels, options.height, options.width, classes),
            count=self.parts["train"].count,
            holdout_count=self.parts["holdout"].count,
            rejected=self.rejected,
            enlarged=self.enlarged,
            duplicates=self.duplicates,
            unlabelled=sum(label not in codes for label in self.labels["train"]) if classes else 0,
            class_counts={name: self.labels["train"].count(name) for name in classes},
            reasons=dict(self.reasons.most_common()),
        )
        durable.write_json(self.folder / INDEX_FILE, self._index(finished, source))
        return finished

    def close(self) -> None:
        """Let go of all open files."""
        for part in self.parts.values():
            part.close()
        self.examples_file.close()
        self.rejected_file.close()

    def _reject(self, row: _Row) -> None:
        self.rejected += 1
        self.reasons[row.reason.split(":")[0]] += 1
        if len(self.first_rejected) < 3:
            self.first_rejected.append(f"{row.id} ({row.reason})")
        self.rejected_file.add({"id": row.id, "path": row.path, "reason": row.reason})

    def _was_enlarged(self, row: _Row) -> bool:
        across, down = self.options.width / row.width, self.options.height / row.height
        return (min(across, down) if self.options.crop == "pad" else max(across, down)) > 1

    def _check(self) -> None:
        """Too little is left to be worth writing."""
        kinds = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))
        if not self.stored:
            what = f"None of {self.rejected} images can be used: {kinds}." if self.rejected else "There is no image."
            hint = f"First: {'; '.join(self.first_rejected)}." if self.rejected else ""
            raise DiffkitError(what, hint, code=ExitCode.DATA)
        fraction = self.rejected / self.done
        if fraction > self.options.max_rejected:
            raise DiffkitError(
                f"{self.rejected} of {self.done} images ({fraction:.1%}) cannot be used: {kinds}. "
                f"First: {'; '.join(self.first_rejected)}.",
                f"Mend or remove them, or go on without them: --max-rejected {_rounded_up(fraction)}",
                code=ExitCode.DATA,
            )
        if not self.parts["train"].count:
            raise DiffkitError(
                f"All {self.stored} images were held out; none is left for training.",
                "Lower --holdout, or add images.",
                code=ExitCode.DATA,
            )

    def _index(self, finished: Finished, source: str) -> dict[str, Any]:
        """The content of dataset.json."""
        kinds = ("images", "labels") if finished.spec.classes else ("images",)
        options = {name: value for name, value in asdict(self.options).items() if name != "workers"}
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": printable(source),
            "spec": finished.spec.to_dict(),
            "count": finished.count,
            "holdout_count": finished.holdout_count,
            "rejected": finished.rejected,
            "enlarged": finished.enlarged,
            "duplicates": finished.duplicates,
            "unlabelled": finished.unlabelled,
            "class_counts": finished.class_counts,
            "mean": self.moments.mean(),
            "std": self.moments.std(),
            "sigma_data": self.moments.sigma_data(),
            "options": options,
            "shards": [asdict(shard) for part in self.parts.values() for shard in part.shards(kinds)],
        }


def _classes(labels: list[str | None]) -> tuple[str, ...]:
    """The names in use, sorted; a single one tells nothing apart."""
    names = sorted({label for label in labels if label is not None})
    return tuple(names) if len(names) > 1 else ()


def _rounded_up(fraction: float) -> str:
    """In per cent, enough to let this fraction pass."""
    return f"{min(100, int(fraction * 100) + 1)}%"


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise DiffkitError(message, hint)
