"""Faults on purpose: what docs/reliability.md promises, tried on this machine.

A row of the scorecard (`scorecard`) is a function that yields trials; most trials run a command in a process of
its own (`selftest.lab`), with a fault (`selftest.operations`, `selftest.powerloss`, `selftest.damage`), and see whether
it recovers to the very bits of an undisturbed one (`selftest.actions`). It takes nothing but diffkit itself.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from diffkit.selftest.bench import ROWS, Bench, Result, Row, opened, run_row

__all__ = ["Bench", "Result", "Row", "opened", "run_row", "scorecard", "selftest"]


def scorecard() -> list[Row]:
    """The rows of the scorecard, in order."""
    from diffkit.selftest.rows import (  # noqa: F401
        access,
        commands,
        damage,
        files,
        images,
        models,
        modes,
        training,
        writing,
    )

    return [ROWS[number] for number in sorted(ROWS)]


def selftest(
    folder: Path, *, numbers: Sequence[int] | None = None, seconds: float | None = None, workers: int = 2
) -> Iterator[Result]:
    """Try every row in a new folder inside `folder`, which is removed afterwards, and yield what came of each.

    `numbers`: only these rows. `seconds`: for all of them together, without those that are slow; else every row is
    tried at full length.
    """
    begun = time.monotonic()
    chosen = [each for each in scorecard() if numbers is None or each.number in numbers]
    place = tempfile.TemporaryDirectory(prefix="diffkit-selftest-", dir=folder, ignore_cleanup_errors=True)
    with place as name, opened(Path(name).resolve(), workers) as bench:
        for place_in_line, each in enumerate(chosen):
            if seconds is None:
                yield run_row(each, bench, each.full, None)
            elif each.slow and numbers is None:
                yield Result(each.number, each.title, untestable="takes minutes; part of the long campaign")
            else:
                left = max(1.0, seconds - (time.monotonic() - begun))
                yield run_row(each, bench, each.full, left / (len(chosen) - place_in_line))
