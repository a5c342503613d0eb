"""A table joined to images: the labels, and the account of how they came about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from diffkit.datasets.columns import Column, text, unknown_marks
from diffkit.datasets.imagefile import printable
from diffkit.datasets.matching import Matches
from diffkit.datasets.tablefile import Sheet
from diffkit.interfaces import Account, Example, Listing, account_of

_RECORDED = 1000


@dataclass(frozen=True)
class Join:
    """Rows and images that belong together.

    `images`: the ids of all images. `row_of`: the row of each image that has one, by the image's number. `columns`:
    what the columns give, and `classes` the class column, both for the rows of `row_of`, in their order. `left_out`:
    columns that give nothing, with the reason. `repeated`: images with several rows that say the same, as text.
    """

    sheet: Sheet
    name_column: str
    class_column: str
    images: Sequence[str]
    matches: Matches
    row_of: Mapping[int, int]
    columns: Mapping[str, Column]
    left_out: Mapping[str, str]
    classes: Sequence[str | None]
    repeated: Sequence[str]

    def labelled(self, examples: Iterable[Example]) -> Listing:
        """The examples with their labels. Classes of the table take the place of all others."""
        before = account_of(examples)
        account = Account(
            before.remarks + self.remarks(),
            {**before.problems, **self.problems()},
            before.skipped,
            {**before.record, "labels": self.record()},
        )
        return Listing(self._labelled(examples), account)

    def _labelled(self, examples: Iterable[Example]) -> Iterator[Example]:
        labels = self.labels()
        for position, example in enumerate(examples):
            found = labels.get(identity(example, position))
            label = example.label if not self.class_column else None if found is None else found[0]
            yield replace(example, label=label, attributes=example.attributes if found is None else found[1])

    def labels(self) -> dict[str, tuple[str | None, dict[str, float]]]:
        """Class and attributes by the id of the image, for those that have a row."""
        labels = {}
        for position, image in enumerate(self.row_of):
            values = {
                name: value for column in self.columns.values() for name, value in column.values[position].items()
            }
            labels[self.images[image]] = self.classes[position], values
        return labels

    def problems(self) -> dict[str, list[str]]:
        """What did not fit, by kind."""
        sheet, rows = self.sheet, list(self.row_of.values())
        names = [text(row.get(self.name_column)) for row in sheet.rows]
        problems = {
            "row without a file name": [sheet.where(row) for row, name in enumerate(names) if not name],
            "row without an image": [
                f"{sheet.where(row)} ({printable(name)})"
                for row, name in enumerate(names)
                if name and row not in self.matches.image_of
            ],
            "image without a row": [name for image, name in enumerate(self.images) if image not in self.row_of],
            "row with too few cells": [sheet.where(row) for row in sheet.short],
            "cell unfit for its column, taken as unknown": [
                f"{sheet.where(rows[position])}, {name}: '{printable(cell)}' among {column.kind}"
                for name, column in self.columns.items()
                for position, cell in sorted(column.unfit.items())
            ],
        }
        return {kind: found for kind, found in problems.items() if found}

    def record(self) -> dict[str, Any]:
        """All of it as plain values, long lists cut short."""
        return {
            "table": printable(str(self.sheet.path)),
            "form": self.sheet.form,
            "rows": len(self.sheet.rows),
            "images": len(self.images),
            "images_with_row": len(self.row_of),
            "name_column": self.name_column,
            "class_column": self.class_column,
            "columns": {
                name: {"kind": column.kind, "unknown": column.unknown, "unknown_as": dict(self._marks(name))}
                for name, column in self.columns.items()
            },
            "left_out": dict(self.left_out),
            "joined_loosely": dict(self.matches.loosely),
            "repeated": list(self.repeated[:_RECORDED]),
            "problems": {
                kind: {"count": len(names), "names": names[:_RECORDED]} for kind, names in self.problems().items()
            },
        }

    def remarks(self) -> list[str]:
        """How the table was understood, in sentences."""
        kinds = [self._described(name, column.kind, column.unknown) for name, column in self.columns.items()]
        if self.class_column:
            kinds.append(self._described(self.class_column, "the class", self.classes.count(None)))
        remarks = [
            f"Labels from {printable(str(self.sheet.path))} ({self.sheet.form}): {len(self.sheet.rows):,} rows, names "
            f"in the column '{self.name_column}'; {len(self.row_of):,} of {len(self.images):,} images have a row.",
            f"Columns: {_shortened(kinds)}.",
        ]
        if self.class_column:
            remarks.append(f"Its column '{self.class_column}' names the classes, not the folders.")
        if self.left_out:
            reasons = [f"{name} ({reason})" for name, reason in self.left_out.items()]
            remarks.append(f"Columns left out: {_shortened(reasons)}. --label-columns names those to use.")
        for way, count in self.matches.loosely.items():
            remarks.append(f"Joined {way}, where only one image fits: {count:,} of the rows.")
        if self.repeated:
            remarks.append(f"Repeated rows that agree: {_shortened(self.repeated)}.")
        return remarks

    def _described(self, name: str, kind: str, unknown: int) -> str:
        """ "age (numbers, 3 unknown: NA)"."""
        marks = ", ".join(sorted(self._marks(name))[:3])
        return f"{name} ({kind}{f', {unknown:,} unknown' if unknown else ''}{f': {marks}' if marks else ''})"

    def _marks(self, name: str) -> Counter[str]:
        """How a column writes what is unknown."""
        return unknown_marks([self.sheet.rows[row].get(name) for row in self.row_of.values()])


def identity(example: Example, position: int) -> str:
    """What an example is called: its id, or else its position."""
    return str(position) if example.id is None else example.id


def _shortened(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
