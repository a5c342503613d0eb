"""Labels from a table beside the images: CSV, TSV, or JSON lines, joined to the examples by their names."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from diffkit.errors import DiffkitError, ExitCode, did_you_mean, nearest_sibling
from diffkit.interfaces import Example

NAME_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_id", "id", "name")
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
UNKNOWN = ("", "nan", "none", "null", "na", "n/a", "?")
MOST_VALUES = 1000

Row = Mapping[str, Any]


class Table:
    """A label for each file name: attributes and, from one column, a class.

    A column of numbers (or of true and false, yes and no) becomes one attribute. A column of words becomes an attribute
    for each word, `column=word`, 1 where the image has it, 0 where it has another; a cell may hold several, separated
    by "|", or be a JSON list. Empty cells are unknown.
    """

    def __init__(self, path: Path, columns: Sequence[str] = (), class_column: str = "") -> None:
        """`columns` become attributes (none named: all but the file name and the class column).

        Raises DiffkitError for a file that cannot be read and for columns that are not there.
        """
        self.path = path
        rows = _read(path)
        known = list(dict.fromkeys(key for row in rows for key in row))
        key = next((name for name in NAME_COLUMNS if name in known), known[0])
        for name in [*columns, *([class_column] if class_column else [])]:
            if name not in known:
                raise DiffkitError(
                    f"{path} has no column '{name}'.",
                    f"{did_you_mean(name, known)}Its columns: {', '.join(known)}.",
                    code=ExitCode.DATA,
                )
        chosen = list(columns) or [name for name in known if name not in (key, class_column)]
        attributes: list[dict[str, float]] = [{} for _ in rows]
        for name in chosen:
            for place, values in zip(attributes, _attributes(path, name, [row.get(name) for row in rows]), strict=True):
                place.update(values)
        classes = [_text(row.get(class_column)) or None if class_column else None for row in rows]
        labels = zip(classes, attributes, strict=True)
        self.rows = {_key(_text(row.get(key))): label for row, label in zip(rows, labels, strict=True)}
        bases = Counter(PurePosixPath(name).name for name in self.rows)
        self.by_base = {PurePosixPath(name).name: name for name in self.rows if bases[PurePosixPath(name).name] == 1}

    def labelled(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples with their labels; those that the table does not name keep what they have.

        Raises DiffkitError at the end if it names none of them.
        """
        matched, first = 0, ""
        for example in examples:
            name = _key(example.id or "")
            first = first or name
            found = self.rows.get(name) or self.rows.get(self.by_base.get(PurePosixPath(name).name, ""))
            if found is None:
                yield example
                continue
            matched += 1
            yield replace(example, label=found[0] or example.label, attributes=found[1])
        if not matched and first:
            raise DiffkitError(
                f"{self.path} names none of the images: it has '{next(iter(self.rows))}', they are like '{first}'.",
                "Its file names must be those of the images, relative to their folder.",
                code=ExitCode.DATA,
            )


def _attributes(path: Path, name: str, cells: list[Any]) -> Iterator[dict[str, float]]:
    """For each cell of a column, the attributes that follow from it."""
    words = [_words(cell) for cell in cells]
    numbers = [_number(each[0]) if len(each) == 1 else None for each in words]
    if all(number is not None for number, each in zip(numbers, words, strict=True) if each):
        yield from ({} if number is None else {name: number} for number in numbers)
        return
    every = sorted({word for each in words for word in each})
    if len(every) > MOST_VALUES:
        raise DiffkitError(
            f"The column '{name}' of {path} holds {len(every):,} different words.",
            "Leave it out: name those that say something of the image with --label-columns.",
            code=ExitCode.DATA,
        )
    for each in words:
        yield {f"{name}={word}": float(word in each) for word in every} if each else {}


def _words(cell: Any) -> list[str]:
    """What a cell holds; nothing if it is unknown."""
    parts = cell if isinstance(cell, list) else _text(cell).split("|")
    return [word for word in map(_text, parts) if word.lower() not in UNKNOWN]


def _number(word: str) -> float | None:
    if word.lower() in WORDS:
        return WORDS[word.lower()]
    try:
        value = float(word)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _key(name: str) -> str:
    return name.replace("\\", "/").removeprefix("./")


def _read(path: Path) -> list[Row]:
    """The rows of a table. Raises DiffkitError if it is none, or empty."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() in {".jsonl", ".ndjson", ".json"}:
            whole = path.suffix.lower() == ".json"
            rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
            rows = list(csv.DictReader(text.splitlines(), dialect=dialect, restval=""))
    except FileNotFoundError as error:
        raise DiffkitError(f"There is no {path}.", nearest_sibling(path), code=ExitCode.DATA) from error
    except (OSError, ValueError, csv.Error) as error:
        raise DiffkitError(f"{path} cannot be read as a table: {error}.", _FORMS, code=ExitCode.DATA) from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row for row in rows):
        raise DiffkitError(f"{path} holds no rows.", _FORMS, code=ExitCode.DATA)
    if any(None in row for row in rows):
        raise DiffkitError(f"{path} has a row with more cells than its first line.", _FORMS, code=ExitCode.DATA)
    return rows


_FORMS = "Give a .csv or .tsv whose first line names the columns, or .jsonl with an object a line."
