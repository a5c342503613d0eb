"""The folder of a data set as it grows, and what is counted on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffkit.datasets.imagefile import printable
from diffkit.engine.prepare.options import Finished, PrepareOptions, plural
from diffkit.engine.prepare.remarks import remarks
from diffkit.engine.prepare.rows import Channels, Row
from diffkit.engine.shards import LineWriter, Moments, ShardWriter
from diffkit.engine.store import (
    FORMAT,
    INDEX_FILE,
    PARTS,
    VERSION,
    Pixels,
    file_sha256,
    kinds_of,
    row_shape,
    write_index,
)
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Account, Attribute, ImageSpec

_SHARD_BYTES = 2**30


@dataclass
class Writer:
    """The folder that grows, and what is counted on the way."""

    folder: Path
    options: PrepareOptions
    channels: Channels
    account: Account
    rejected: int = 0
    enlarged: int = 0
    several: int = 0
    duplicates: int = 0
    deep: int = 0
    peak: int = 0
    labels: dict[str, list[str | None]] = field(default_factory=lambda: {part: [] for part in PARTS})
    attributes: dict[str, list[Mapping[str, float]]] = field(default_factory=lambda: {part: [] for part in PARTS})
    reasons: Counter[str] = field(default_factory=Counter)
    all_rejected: list[str] = field(default_factory=list)
    without_label: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)
    waiting: dict[str, tuple[Row, Pixels]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        self.spec = ImageSpec(self.channels.image, options.height, options.width, image_channels=self.channels.input)
        per_shard = options.shard_images or max(
            1, _SHARD_BYTES // (options.height * options.width * sum(self.channels))
        )

        def writers(kind: str) -> dict[str, ShardWriter]:
            row = row_shape(self.spec, kind)
            return {part: ShardWriter(self.folder, kind, part, row, per_shard) for part in PARTS}

        self.parts = writers("images")
        self.inputs = writers("inputs") if self.channels.input else {}
        self.moments = Moments(self.channels.image)
        self.examples_file = LineWriter(self.folder / "examples.jsonl")
        self.rejected_file = LineWriter(self.folder / "rejected.jsonl")

    @property
    def stored(self) -> int:
        """Images written, of both parts."""
        return sum(part.count for part in self.parts.values())

    @property
    def done(self) -> int:
        """Examples seen."""
        return self.stored + self.rejected + len(self.waiting)

    def add(self, row: Row) -> None:
        """Store a row, or note why it is not stored."""
        if row.pixels is None:
            self._reject(row)
            return
        if row.part in PARTS and self.options.keep_split:
            self._store(row, row.pixels, row.part)
        elif int(row.sha256[:16], 16) / 2**64 < self.options.holdout:
            self._hold_out(row, row.pixels)
        else:
            self._store(row, row.pixels, "train")

    def _hold_out(self, row: Row, pixels: Pixels) -> None:
        """Unless the class has no image for training yet: then one waits, for it may be the only one."""
        if row.label is None or row.label in self.trained or row.label in self.waiting:
            self._store(row, pixels, "holdout")
        else:
            self.waiting[row.label] = row, pixels

    def _store(self, row: Row, pixels: Pixels, part: str) -> None:
        if part == "train" and row.label is not None and row.label not in self.trained:
            self.trained.add(row.label)
            if waited := self.waiting.pop(row.label, None):
                self._store(*waited, "holdout")
        self.parts[part].add(pixels)
        if row.input is not None:
            self.inputs[part].add(row.input)
        self.labels[part].append(row.label)
        self.attributes[part].append(row.attributes)
        if row.label is None:
            self.without_label.append(row.id)
        if part == "train":
            self.moments.add(pixels)
        key = bytes.fromhex(row.sha256[:32])
        self.duplicates += key in self.seen
        self.seen.add(key)
        self.enlarged += self._was_enlarged(row)
        self.several += row.several
        self.deep += row.peak > 0
        self.peak = max(self.peak, row.peak)
        self.examples_file.add(
            {
                "id": row.id,
                "path": row.path,
                "width": row.width,
                "height": row.height,
                "sha256": row.sha256,
                "label": row.label,
                **({"attributes": dict(row.attributes)} if row.attributes else {}),
                "part": part,
            }
        )

    def finish(self, out: Path, source: str) -> Finished:
        """Labels, hashes and dataset.json; raises DiffkitError where the set is of no use."""
        kept = sorted(self.waiting)
        for label in kept:
            self._store(*self.waiting.pop(label), "train")
        self._check()
        classes = _classes(self.labels["train"])
        codes = {name: code for code, name in enumerate(classes)}
        self.spec = replace(self.spec, classes=classes, attributes=_attributes(self.attributes["train"]))
        self._note_labels(kept)
        self._refuse_what_does_not_fit()
        for part in [*self.parts.values(), *self.inputs.values()]:
            part.finish_shard()
        for name, images in self.parts.items():
            if classes:
                labels = [-1 if label is None else codes.get(label, -1) for label in self.labels[name]]
                images.write_beside("labels", np.array(labels, "<i8"))
            if self.spec.attributes:
                images.write_beside("attributes", self._values(name))
        for name, reason in self.account.skipped:
            self.rejected_file.add({"id": name, "path": name, "reason": reason})
        if self.several:
            what = plural(self.several, "file of several frames or pages")
            self.account.remarks.append(f"{what}: the first one is used.")
            self.account.record["first_of_several"] = self.several
        self.examples_file.finish()
        self.rejected_file.finish()
        finished = Finished(
            path=out,
            spec=self.spec,
            count=self.parts["train"].count,
            holdout_count=self.parts["holdout"].count,
            rejected=self.rejected,
            enlarged=self.enlarged,
            duplicates=self.duplicates,
            unlabelled=sum(label not in codes for label in self.labels["train"]) if classes else 0,
            class_counts={name: self.labels["train"].count(name) for name in classes},
            reasons=dict(self.reasons.most_common()),
            account=self.account,
            warnings=remarks(self.deep, self.peak, self.moments),
        )
        write_index(self.folder / INDEX_FILE, self._index(finished, source))
        return finished

    def close(self) -> None:
        """Let go of all open files."""
        for part in [*self.parts.values(), *self.inputs.values()]:
            part.close()
        self.examples_file.close()
        self.rejected_file.close()

    def _values(self, part: str) -> npt.NDArray[np.float32]:
        """The attributes of a part [N, A]; NaN = unknown."""
        names = [attribute.name for attribute in self.spec.attributes]
        rows = [[row.get(name, np.nan) for name in names] for row in self.attributes[part]]
        return np.array(rows, "<f4").reshape(len(rows), len(names))

    def _reject(self, row: Row) -> None:
        self.rejected += 1
        self.reasons[row.reason.split(":")[0]] += 1
        self.all_rejected.append(f"{row.id} ({row.reason})")
        self.rejected_file.add({"id": row.id, "path": row.path, "reason": row.reason})

    def _was_enlarged(self, row: Row) -> bool:
        across, down = self.options.width / row.width, self.options.height / row.height
        return (min(across, down) if self.options.crop == "pad" else max(across, down)) > 1

    def _check(self) -> None:
        """Too little is left to be worth writing."""
        kinds = ", ".join(f"{reason} ({count})" for reason, count in self.reasons.most_common(3))
        if not self.stored:
            what = f"None of {self.rejected} images can be used: {kinds}." if self.rejected else "There is no image."
            hint = f"First: {'; '.join(self.all_rejected[:3])}." if self.rejected else ""
            raise DiffkitError(what, hint, code=ExitCode.DATA)
        fraction = self.rejected / self.done
        if fraction > self.options.max_rejected:
            raise DiffkitError(
                f"{self.rejected} of {self.done} images ({fraction:.1%}) cannot be used: {kinds}. "
                f"First: {'; '.join(self.all_rejected[:3])}.",
                f"Mend or remove them, or go on without them: --max-rejected {_rounded_up(fraction)}",
                code=ExitCode.DATA,
            )
        if not self.parts["train"].count:
            raise DiffkitError(
                f"All {self.stored} images were held out; none is left for training.",
                "Lower --holdout, or add images.",
                code=ExitCode.DATA,
            )

    def _note_labels(self, kept: list[str]) -> None:
        """What became of classes and attributes that training cannot use."""
        remarks = self.account.remarks
        labels = {part: {label for label in self.labels[part] if label is not None} for part in PARTS}
        if kept and self.spec.classes:
            remarks.append(f"{_listed(kept)}: the only image of its class stays in training instead of the hold-out.")
        if len(labels["train"]) == 1 and not self.spec.classes:
            remarks.append(f"{_listed(labels['train'])} is the only class, and tells nothing apart: no classes.")
        if unseen := sorted(labels["holdout"] - labels["train"]):
            self.account.problems["class among held-out images only"] = unseen
        if alike := _alike([*self.spec.classes, *(attribute.name for attribute in self.spec.attributes)]):
            self.account.problems["label that differs from another in spelling only"] = alike
        known = {name for rows in self.attributes.values() for row in rows for name in row}
        if constant := sorted(known - {attribute.name for attribute in self.spec.attributes}):
            remarks.append(f"Attributes that are the same in all training images, left out: {_listed(constant)}.")
        self.account.record["left_out_attributes"] = constant
        self.account.record["kept_from_holdout"] = kept

    def _refuse_what_does_not_fit(self) -> None:
        """The promise of `strict`."""
        problems = {
            "image rejected": self.all_rejected,
            "file passed over": [f"{name} ({reason})" for name, reason in self.account.skipped],
            "image without a label": self.without_label if self.spec.classes else [],
            **self.account.problems,
        }
        problems = {kind: names for kind, names in problems.items() if names}
        if self.options.strict and problems:
            lines = [f"{plural(len(names), kind)}: {_listed(names, 20)}" for kind, names in problems.items()]
            raise DiffkitError(
                "With --strict everything must fit, and it does not:\n  " + "\n  ".join(lines),
                "Nothing was written. Mend these, or go on without --strict.",
                code=ExitCode.DATA,
            )

    def _index(self, finished: Finished, source: str) -> dict[str, Any]:
        """The content of dataset.json."""
        options = {name: value for name, value in asdict(self.options).items() if name not in ("workers", "strict")}
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
            "passed_over": len(self.account.skipped),
            **self.account.record,
            "mean": self.moments.mean(),
            "std": self.moments.std(),
            "sigma_data": self.moments.sigma_data(),
            "warnings": list(finished.warnings),
            "options": options,
            "shards": [
                asdict(shard)
                for part in self.parts.values()
                for kind in kinds_of(self.spec)
                for shard in part.shards(kind)
            ],
            "records": {file.path.name: file_sha256(file.path) for file in (self.examples_file, self.rejected_file)},
        }


def _attributes(rows: list[Mapping[str, float]]) -> tuple[Attribute, ...]:
    """In the order in which they are first seen, with their ranges; one that is always the same says nothing."""
    values: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            values.setdefault(name, []).append(value)
    ranges = [Attribute(name, min(found), max(found)) for name, found in values.items()]
    return tuple(attribute for attribute in ranges if attribute.low < attribute.high)


def _classes(labels: list[str | None]) -> tuple[str, ...]:
    """The names in use, sorted; a single one tells nothing apart."""
    names = sorted({label for label in labels if label is not None})
    return tuple(names) if len(names) > 1 else ()


def _alike(names: Iterable[str]) -> list[str]:
    """Those that are the same but for capital letters and blanks, together: "Cat, cat"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("".join(name.casefold().split()), []).append(name)
    return [", ".join(group) for group in groups.values() if len(group) > 1]


def _listed(names: Iterable[str], most: int = 5) -> str:
    every = list(names)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return ", ".join(map(printable, every[:most])) + more


def _rounded_up(fraction: float) -> str:
    """In per cent, enough to let this fraction pass."""
    return f"{min(100, int(fraction * 100) + 1)}%"
