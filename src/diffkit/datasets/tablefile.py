"""Files that hold a table: CSV with any usual delimiter and encoding, JSON lines, JSON."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkit.errors import DiffkitError, ExitCode, nearest_sibling

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LARGEST = 512 * 2**20  # bytes of a table; more is some other file, or a device without an end
MOST_COLUMNS = 2_000
FORMS = "Give a .csv or .tsv whose first line names the columns, or .jsonl with an object on each line."

_BOMS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig"}
_BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_BINARY = {b"PK\x03\x04": "a spreadsheet or a zip archive", b"PAR1": "a Parquet file", b"%PDF": "a PDF document"}
_BINARY |= {b"\xd0\xcf\x11\xe0": "an old Excel file", b"SQLite": "a database"}
_SURROGATE = re.compile(r"\\ud[89a-f]|[\ud800-\udfff]")
_INDEX = re.compile(r"Unnamed: \d+")


@dataclass
class Sheet:
    """A table: the names of its columns, and its rows as values by column.

    `lines`: where each row begins. `unit`: what `lines` count, "line" or "entry". `encoding` and `delimiter` (empty for
    JSON): as found. `short`: the rows that end before the last column. `unnamed`: columns without a name, such as the
    index that pandas writes, which are called "column 1" here.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, Any]]
    lines: list[int]
    encoding: str
    unit: str = "line"
    delimiter: str = ""
    short: tuple[int, ...] = ()
    unnamed: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        """ "line 12", for people."""
        return f"{self.unit} {self.lines[row]}"

    @property
    def form(self) -> str:
        """How the file was read, in words."""
        return f"{DELIMITERS[self.delimiter]}, {self.encoding}" if self.delimiter else f"JSON, {self.encoding}"


def read_sheet(path: Path) -> Sheet:
    """The table at `path`. Raises DiffkitError, naming the line, for anything that is not one, or is empty."""
    try:
        text, encoding = _text(_bytes(path))
        suffix = path.suffix.lower()
        if suffix in {".jsonl", ".ndjson"} or _begins_with_object(text):
            sheet = _json_lines(path, text, encoding)
        elif suffix == ".json":
            sheet = _json(path, text, encoding)
        else:
            sheet = _delimited(path, text, encoding)
    except FileNotFoundError as error:
        raise DiffkitError(f"There is no {path}.", nearest_sibling(path), code=ExitCode.DATA) from error
    except OSError as error:
        raise DiffkitError(f"{path} cannot be read: {error.strerror}.", FORMS, code=ExitCode.DATA) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise DiffkitError(f"{path} cannot be read as a table: {error}.", FORMS, code=ExitCode.DATA) from error
    if not sheet.rows or not sheet.columns:
        raise DiffkitError(f"{path} holds no rows.", FORMS, code=ExitCode.DATA)
    return sheet


def _bytes(path: Path) -> bytes:
    """What the file holds, read no further than `LARGEST`."""
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if os.name == "posix":
            os.set_blocking(file.fileno(), True)  # a pipe is not waited for until somebody writes, but then it is
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST / 2**20:,.0f} MiB")
    return data


def _text(data: bytes) -> tuple[str, str]:
    """The text and the name of its encoding. Raises ValueError for what is not text."""
    for magic, what in _BINARY.items():
        if data.startswith(magic):
            raise ValueError(f"it is {what}; save it as CSV")
    encoding = next((name for bom, name in _BOMS.items() if data.startswith(bom)), "")
    if not encoding and len(data) > 3 and 0 in data[:4]:
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    if encoding:
        text = data.decode(encoding)
    else:
        try:
            text, encoding = data.decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            try:
                text, encoding = data.decode("cp1252"), "cp1252"
            except UnicodeDecodeError:
                raise ValueError("its encoding is neither UTF-8, UTF-16 nor cp1252; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("it holds NUL characters, so it is not text")
    names = {"utf-8-sig": "UTF-8", "utf-8": "UTF-8", "cp1252": "cp1252 (not UTF-8)"}
    return text, names.get(encoding, encoding.upper())


# Delimited text.


def _delimited(path: Path, text: str, encoding: str) -> Sheet:
    declared = re.match(r"sep=(.)\r?\n", text)  # Excel's own way to name the delimiter
    skipped = 1 if declared else 0
    text = text[declared.end() :] if declared else text
    delimiter = declared[1] if declared and declared[1] in DELIMITERS else _delimiter(path, text)
    records = list(_records(text, delimiter))
    if not records:
        return Sheet(path, [], [], [], encoding)
    header, unnamed = _header([cell.strip() for cell in records[0][1]])
    sheet = Sheet(path, header, [], [], encoding, delimiter=delimiter, unnamed=unnamed)
    short = []
    for line, cells in records[1:]:
        while len(cells) > len(header) and not cells[-1].strip():
            cells.pop()
        if len(cells) > len(header):
            count = f"{len(cells)} cells, but the first line names {len(header)} columns"
            raise ValueError(f"line {line + skipped} has {count}; put a cell that holds a delimiter into quotes")
        if len(cells) < len(header):
            short.append(len(sheet.rows))
        sheet.rows.append(dict(zip(header, cells, strict=False)))
        sheet.lines.append(line + skipped)
    sheet.short = tuple(short)
    return sheet


def _records(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line on which each record begins, and its cells. Only real line ends end a line; quoted ones do not."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    begin = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"the record that begins on line {begin}: {error}") from error
        if any(cell.strip() for cell in cells):
            yield begin, cells
        begin = reader.line_num + 1


def _delimiter(path: Path, text: str) -> str:
    """The delimiter that divides the first line, and that most other lines agree with."""
    scores: dict[str, tuple[int, int]] = {}
    problem: ValueError | None = None
    for delimiter in "\t,;|" if path.suffix.lower() == ".tsv" else ",;\t|":
        try:
            widths = [len(cells) for _, cells in _records(text, delimiter)]
        except ValueError as error:
            problem = problem or error
            continue
        if widths and widths[0] > 1:
            scores[delimiter] = Counter(widths)[widths[0]], widths[0]
    if scores:
        return max(scores, key=lambda each: scores[each])
    if problem is not None:
        raise problem
    if text.strip():
        raise ValueError(f"its first line names one column only; {', '.join(DELIMITERS.values())} may divide them")
    return ","


def _header(cells: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The names of the columns, all different, and those that stand for no name."""
    while cells and not cells[-1] and len(cells) > 2:
        cells.pop()
    unnamed = [not cell or _INDEX.fullmatch(cell) is not None for cell in cells]
    names = [
        f"column {n}" if missing else cell for n, (cell, missing) in enumerate(zip(cells, unnamed, strict=True), 1)
    ]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"its first line names the column '{repeated[0]}' twice")
    return names, tuple(name for name, missing in zip(names, unnamed, strict=True) if missing)


# JSON.


def _json_lines(path: Path, text: str, encoding: str) -> Sheet:
    sheet = Sheet(path, [], [], [], encoding)
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=_unique)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            _add(sheet, value, number)
    return sheet


def _json(path: Path, text: str, encoding: str) -> Sheet:
    """A list of objects, an object of labels by file name, or the {"labels": [[name, label], ...]} of StyleGAN."""
    sheet = Sheet(path, [], [], [], encoding, unit="entry")
    value = json.loads(text, object_pairs_hook=_unique)
    if isinstance(value, dict) and list(value) == ["labels"] and isinstance(value["labels"], list):
        for number, pair in enumerate(value["labels"], 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"entry {number} of its labels must be [name, label], and is {json.dumps(pair)[:80]}")
        value = [dict(zip(("file_name", "label"), pair, strict=True)) for pair in value["labels"]]
    if isinstance(value, dict):
        for name, row in value.items():
            if isinstance(row, dict) and row.get("file_name", name) != name:
                raise ValueError(f"the entry '{name}' has another file_name, {json.dumps(row['file_name'])[:80]}")
        value = [
            {"file_name": name, **(row if isinstance(row, dict) else {"label": row})} for name, row in value.items()
        ]
    if not isinstance(value, list):
        raise ValueError("it holds neither a list of objects nor an object of labels by file name")
    for number, row in enumerate(value, 1):
        _add(sheet, row, number)
    return sheet


def _begins_with_object(text: str) -> bool:
    """Whether the first of several lines is an object of its own: JSON lines, whatever the file is called."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and first.startswith("{") and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _add(sheet: Sheet, row: Any, number: int) -> None:
    if not isinstance(row, dict) or not row:
        raise ValueError(f"{sheet.unit} {number} is not an object with keys")
    if _SURROGATE.search(json.dumps(row)) and _SURROGATE.search(json.dumps(row, ensure_ascii=False)):
        raise ValueError(f"{sheet.unit} {number} holds half a character (a lone surrogate)")
    row = _unique([(name.strip(), value) for name, value in row.items()])
    known = set(sheet.columns) if len(row) > 1 else sheet.columns
    sheet.columns += [name for name in row if name not in known]
    if len(sheet.columns) > MOST_COLUMNS:
        raise ValueError(f"{sheet.unit} {number}: more than {MOST_COLUMNS:,} different keys")
    sheet.rows.append(row)
    sheet.lines.append(number)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; JSON itself would let the last of two equal keys win."""
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"the key '{repeated[0]}' stands twice in one object")
    return dict(pairs)
