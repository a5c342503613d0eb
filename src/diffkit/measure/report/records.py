"""What a run's files say: read once, thinned while they are read."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffkit import records

POINTS = 500
SHARES = 8
COLUMNS = ("images", "loss", "grad_norm", "lr", "images_per_second", "data_wait")

Numbers = npt.NDArray[np.float64]


@dataclass
class Records:
    """`steps`: COLUMNS by name, means over at most 500 spans of the training; `by_level` [spans, 8]: the training error
    in eight shares of its noise levels; the others as they were written. `passed_over`: lines of no known
    form."""

    steps: dict[str, Numbers]
    by_level: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    validations: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    non_finite: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    passed_over: int = 0

    def accepted(self, lines: Iterable[dict[str, Any] | None]) -> list[dict[str, Any]]:
        """Those that could be read; the others are counted."""
        every = list(lines)
        self.passed_over += every.count(None)
        return [line for line in every if line is not None]

    @property
    def images_seen(self) -> int:
        """At the last record."""
        ends = [int(self.steps["images"][-1])] if len(self.steps["images"]) else []
        return max(ends + [int(each["images"]) for each in self.validations + self.previews], default=0)

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the lowest held-out loss."""
        return min(self.validations, key=lambda each: float(each["holdout_loss"]), default=None)


def read_records(run: Path) -> Records:
    """The records of a run's folder; missing files are empty, torn lines are passed over."""
    columns = {name: array("d") for name in COLUMNS}
    by_level = array("d")
    found = Records({})
    for line in records.metrics(run / "metrics.jsonl"):
        if line is None:
            found.passed_over += 1
        elif "non_finite" in line:
            found.non_finite.append(line)
        elif "loss" in line:
            for name, column in columns.items():
                column.append(float(line.get(name) or 0.0))
            shares = line.get("loss_by_level") or []
            by_level.extend(math.nan if value is None else value for value in (*shares, *[None] * SHARES)[:SHARES])
        elif "holdout_loss" in line:
            found.validations.append(line)
        else:
            found.previews.append(line)
    found.steps = {name: _thinned(np.frombuffer(column) if column else np.zeros(0)) for name, column in columns.items()}
    rows = np.frombuffer(by_level).reshape(-1, SHARES) if by_level else np.zeros((0, SHARES))
    found.by_level = np.stack([_thinned(column) for column in rows.T], axis=1)
    found.sessions = found.accepted(records.sessions(run / "sessions.jsonl"))
    found.evaluations = found.accepted(records.evaluations(run / "evaluations.jsonl"))
    known = {each["picture"] for each in found.previews}
    for path in sorted((run / "samples").glob("images-*.png")):
        if not path.stem[7:].isdecimal():
            continue
        if (name := f"samples/{path.name}") not in known:
            found.previews.append({"images": int(path.stem.split("-")[1]), "picture": name})
    found.previews.sort(key=lambda each: int(each["images"]))
    return found


def _thinned(values: Numbers) -> Numbers:
    """Means over at most POINTS equal spans, of what is known in them."""
    if len(values) <= POINTS:
        return values
    edges = np.linspace(0, len(values), POINTS + 1).astype(int)
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges[:-1])
    counts = np.add.reduceat(known.astype(np.float64), edges[:-1])
    means: Numbers = np.divide(sums, counts, out=np.full(POINTS, np.nan), where=counts > 0)
    return means
