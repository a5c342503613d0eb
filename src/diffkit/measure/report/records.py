"""What a run's files say: read once, thinned while they are read."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffkit.durable import read_lines

POINTS = 500
SHARES = 8
COLUMNS = ("images", "loss", "grad_norm", "lr", "images_per_second", "data_wait")

Numbers = npt.NDArray[np.float64]


@dataclass
class Records:
    """`steps`: COLUMNS by name, means over at most 500 spans of the training; `by_level` [spans, 8]: the training error
    in eight shares of its noise levels; the others as they were written."""

    steps: dict[str, Numbers]
    by_level: Numbers = field(default_factory=lambda: np.zeros((0, 0)))
    validations: list[dict[str, Any]] = field(default_factory=list)
    previews: list[dict[str, Any]] = field(default_factory=list)
    non_finite: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)

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
    records = Records({})
    for line in _lines(run / "metrics.jsonl"):
        if "non_finite" in line:
            records.non_finite.append(line)
        elif "loss" in line:
            for name, column in columns.items():
                column.append(float(line.get(name) or 0.0))
            shares = line.get("loss_by_level") or [None] * SHARES
            by_level.extend(math.nan if value is None else float(value) for value in shares[:SHARES])
        elif "holdout_loss" in line:
            records.validations.append(line)
        elif "picture" in line:
            records.previews.append(line)
    records.steps = {
        name: _thinned(np.frombuffer(column) if column else np.zeros(0)) for name, column in columns.items()
    }
    rows = np.frombuffer(by_level).reshape(-1, SHARES) if by_level else np.zeros((0, SHARES))
    records.by_level = np.stack([_thinned(column) for column in rows.T], axis=1)
    records.sessions = read_lines(run / "sessions.jsonl")
    records.evaluations = read_lines(run / "evaluations.jsonl")
    known = {each["picture"] for each in records.previews}
    for path in sorted((run / "samples").glob("images-*.png")):
        if (name := f"samples/{path.name}") not in known:
            records.previews.append({"images": int(path.stem.split("-")[1]), "picture": name})
    records.previews.sort(key=lambda each: int(each["images"]))
    return records


def _lines(path: Path) -> Any:
    """One by one: the file may be long."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


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
