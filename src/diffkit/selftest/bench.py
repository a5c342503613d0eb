"""The rows of the self-test, and the processes that run their trials side by side."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from diffkit.errors import DiffkitError, ExitCode
from diffkit.selftest.lab import Lab
from diffkit.selftest.processes import adopt_orphans

PRELOADED = (
    "diffkit.selftest.single_thread",
    "diffkit.backbones.unet",
    "typer.rich_utils",
    "rich.progress",
    "diffkit.compose.start",
    "diffkit.engine.prepare",
    "diffkit.engine.session",
    "diffkit.engine.snapshots",
)
"""What takes long to import. Not diffkit.cli, whose consoles suit the terminal that there is when they are made: the
self-test's, not its trials'."""


@dataclass(frozen=True)
class Trial:
    """What was tried, and what was wrong, if anything; `count`: how many things at once."""

    what: str
    problem: str = ""
    count: int = 1


class Untestable(Exception):
    """A row that cannot be tried on this machine, and why."""


@dataclass(frozen=True)
class Bench:
    """A lab, and processes to try things in it."""

    lab: Lab
    pool: ProcessPoolExecutor
    workers: int

    def each(self, trial: Callable[..., Trial], items: Iterable[tuple[Any, ...]]) -> Iterator[Trial]:
        """`trial(lab, *item)` for each item, in order; a few of them at once."""
        under_way: deque[Future[Trial]] = deque()
        try:
            for item in items:
                under_way.append(self.pool.submit(trial, self.lab, *item))
                if len(under_way) > self.workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()

    def ask(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """`function(lab, *arguments)`, in one of the processes."""
        return self.pool.submit(function, self.lab, *arguments).result()

    def cases(self, *cases: Case) -> Iterator[Trial]:
        """Each case once."""
        return self.each(in_a_room, [(case,) for case in cases])


Answer = TypeVar("Answer")
Case: TypeAlias = Callable[[Lab, Path], str]
"""Something to try in an empty folder; returns what was wrong. Its docstring says what is tried."""

Trials: TypeAlias = Callable[[Bench], Iterator[Trial]]


def in_a_room(lab: Lab, case: Case) -> Trial:
    """A case as a trial."""
    room = lab.room()
    try:
        problem = case(lab, room)
    finally:
        shutil.rmtree(room, ignore_errors=True)
    return Trial((case.__doc__ or case.__name__).strip().rstrip("."), problem)


@dataclass(frozen=True)
class Row:
    """A row of the scorecard. `full`: how many trials the long campaign makes; None = all that there are. `slow`: each
    trial takes a good part of a minute."""

    number: int
    title: str
    trials: Trials
    full: int | None
    slow: bool


@dataclass
class Result:
    """What came of a row."""

    number: int
    title: str
    trials: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    untestable: str = ""


ROWS: dict[int, Row] = {}


def row(number: int, title: str, full: int | None = None, *, slow: bool = False) -> Callable[[Trials], Trials]:
    """Enter a function that makes trials as a row. Any of its first trials should be a fair sample of all."""

    def enter(trials: Trials) -> Trials:
        ROWS[number] = Row(number, title, trials, full, slow)
        return trials

    return enter


def run_row(of: Row, bench: Bench, most: int | None, seconds: float | None) -> Result:
    """Make the trials of a row, at most so many, and for at most so long."""
    result, begun = Result(of.number, of.title), time.monotonic()
    trials = of.trials(bench)
    try:
        for trial in trials:
            result.trials += trial.count
            if trial.problem:
                result.wrong.append(f"{trial.what}: {trial.problem}")
            result.seconds = time.monotonic() - begun
            if (most and result.trials >= most) or (seconds and result.seconds >= seconds):
                break
    except Untestable as reason:
        result.untestable = str(reason)
    finally:
        trials.close()  # type: ignore[attr-defined]
    return result


@contextmanager
def opened(folder: Path, workers: int) -> Iterator[Bench]:
    """A bench in an empty folder, with all that trials start from."""
    from diffkit.selftest.actions import build

    lab = Lab(folder)
    forkserver = sys.platform == "linux"
    context = get_context("forkserver" if forkserver else "spawn")
    if forkserver:
        context.set_forkserver_preload(list(PRELOADED))
    pool = ProcessPoolExecutor(workers, context, initializer=_worker)
    try:
        pool.submit(partial(build, lab)).result()
        yield Bench(lab, pool, workers)
    except BrokenProcessPool as error:
        raise DiffkitError(
            "A process of the self-test was ended from outside.", "Is there too little memory?", code=ExitCode.MACHINE
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the self-test, which then ends its workers
    os.environ["OMP_NUM_THREADS"] = "1"
    adopt_orphans()
