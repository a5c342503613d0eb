"""What a column of a table holds (numbers, truths, words), and the attributes that follow from its cells."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

TRUTHS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
UNKNOWN = frozenset(
    {"", "nan", "-nan", "none", "null", "nil", "na", "n/a", "n.a.", "<na>", "#n/a", "#na", "#null!", "#value!"}
    | {"?", "-", "--", "1.#ind", "-1.#ind"}
)
MOST_WORDS = 1000

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MARKED = re.compile(r"[$€£¥]?\s*[+-]?\d[\d.,'’\s]*[%$€£¥]?")
_FLOAT32_MAX = 3.4e38
# How few of the cells may fit, so that the others are taken for mistakes.
_NUMBERS_FIT, _TRUTHS_FIT = 0.5, 0.9
_FEW = 10


class ColumnError(Exception):
    """A column that cannot be used: `reason`, and the row that shows it (None = all of it).

    `ambiguous`: it may mean two things, so that leaving it out would be a guess as well.
    """

    def __init__(self, reason: str, row: int | None = None, *, ambiguous: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.row, self.ambiguous = reason, row, ambiguous


@dataclass
class Column:
    """A column, read.

    `kind`: "numbers", "numbers with decimal commas", "percentages", "truths", "words" or "lists". `values`: attributes
    of each row. `unknown`: rows without a value. `unfit`: the rows whose cell does not fit the kind and is therefore
    unknown, with the cell.
    """

    kind: str
    values: list[dict[str, float]]
    unknown: int = 0
    unfit: dict[int, str] = field(default_factory=dict)


def read_column(name: str, cells: Sequence[Any], decimal_comma: bool = False) -> Column:
    """The attributes that a column gives.

    Numbers, if at least half of the known cells are; truths, if nine in ten are; a cell that does not fit is unknown
    then. Everything else is words: an attribute for each, `name=word`, 1 where the row has it; a cell may hold several,
    divided by "|", or be a JSON list. `decimal_comma`: 1,5 is a number. Raises ColumnError.
    """
    words = [_words(cell, row) for row, cell in enumerate(cells)]
    known = {row: found[0] for row, found in enumerate(words) if len(found) == 1}
    filled = sum(map(bool, words))
    unknown = len(cells) - filled
    for kind, read, least in _kinds(list(known.values()), decimal_comma):
        values = {row: number for row, cell in known.items() if (number := read(cell)) is not None}
        if filled and len(values) >= least * filled:
            unfit = {row: "|".join(found) for row, found in enumerate(words) if found and row not in values}
            given = [{name: values[row]} if row in values else {} for row in range(len(cells))]
            return Column(kind, given, unknown, unfit)
    marked = [row for row, cell in known.items() if _MARKED.fullmatch(cell) and _number(cell) is None]
    if 2 * len(marked) > filled:
        cell = known[marked[0]]
        raise ColumnError(f"'{cell}' may be a number or a word (write numbers as 1200.5)", marked[0], ambiguous=True)
    every = sorted({word for found in words for word in found})
    if len(every) > MOST_WORDS:
        raise ColumnError(f"it holds {len(every):,} different words")
    kind = (
        "lists" if any(isinstance(cell, list) for cell in cells) or any(len(found) > 1 for found in words) else "words"
    )
    attributes = [{f"{name}={word}": float(word in found) for word in every} if found else {} for found in words]
    return Column(kind, attributes, unknown)


def tells_apart(cells: Sequence[Any]) -> bool:
    """Whether a column says something else in nearly every row (captions, addresses), so that no words repeat."""
    known = [text(cell) for cell in cells if not isinstance(cell, list) and not is_unknown(cell)]
    return len(known) >= _FEW and len(set(known)) > 0.9 * len(known)


def is_unknown(cell: Any) -> bool:
    """Whether a cell stands for no value: empty, nan, null, N/A, ? and the like."""
    return text(cell).lower() in UNKNOWN


def text(cell: Any) -> str:
    """A cell as text, without blanks around it."""
    return "" if cell is None else str(cell).strip()


def word_of(cell: Any) -> str:
    """A cell as a word: as text, with its accents composed, so that the same word is the same label."""
    return unicodedata.normalize("NFC", text(cell))


def unknown_marks(cells: Sequence[Any]) -> Counter[str]:
    """How unknown cells are written, apart from empty ones."""
    return Counter(text(cell) for cell in cells if is_unknown(cell) and text(cell))


def _kinds(known: Sequence[str], decimal_comma: bool) -> list[tuple[str, Callable[[str], float | None], float]]:
    """The kinds to try, in order: how each reads a cell, and the least share of cells that must fit."""
    truths = [cell.lower() in TRUTHS for cell in known]
    numbers = [_number(cell) for cell in known]
    kinds: list[tuple[str, Callable[[str], float | None], float]] = []
    if any(truths) and all(number in (None, 0.0, 1.0) for number in numbers):
        kinds.append(("truths", lambda cell: TRUTHS.get(cell.lower(), _number(cell)), _TRUTHS_FIT))
    points = any("." in cell for cell, number in zip(known, numbers, strict=True) if number is not None)
    if decimal_comma and not points and any("," in cell for cell in known):
        kinds.append(("numbers with decimal commas", lambda cell: _number(cell.replace(",", ".")), _NUMBERS_FIT))
    kinds.append(("numbers", _number, _NUMBERS_FIT))
    kinds.append(("percentages", lambda cell: _number(cell[:-1].strip()) if cell.endswith("%") else None, 1.0))
    return kinds


def _number(word: str) -> float | None:
    if not _NUMBER.fullmatch(word):
        return None
    value = float(word)
    return value if math.isfinite(value) and abs(value) <= _FLOAT32_MAX else None


def _words(cell: Any, row: int) -> list[str]:
    """What a cell holds; nothing if it is unknown."""
    if isinstance(cell, dict) or (isinstance(cell, list) and any(isinstance(part, (dict, list)) for part in cell)):
        raise ColumnError("it holds objects", row)
    if isinstance(cell, list) and any(isinstance(part, (int, float)) for part in cell):
        raise ColumnError("it holds lists of numbers", row)
    parts = cell if isinstance(cell, list) else text(cell).split("|")
    return list(dict.fromkeys(word_of(part) for part in parts if not is_unknown(part)))
