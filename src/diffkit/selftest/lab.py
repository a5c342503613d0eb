"""Where trials run: commands in processes of their own, forked from one that has torch in memory already."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

from diffkit.selftest.processes import end_orphans

Setup: TypeAlias = Callable[[], object]
"""What is done in the new process before its command: a fault is put in place, a limit is set."""

FORKS = sys.platform == "linux"
DEADLINE = 60.0
HUNG = -999
DOCUMENTED = frozenset({0, 2, 3, 4, 5, 6, 7, 75, 130})
"""Exit codes a command may end with whatever it is given; 1 is a bug."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: `code` is negative if a signal ended it, and `HUNG` if it had to be ended; `output` is all
    that it printed; `memory` is the growth of its peak memory in bytes, 0 if it did not live to tell; `orphans`:
    processes that it left behind."""

    code: int
    output: str
    seconds: float
    memory: int
    orphans: int = 0

    @property
    def bug(self) -> str:
        """Whether it ended in a way that is never right, and how."""
        if self.orphans:
            return f"{self.orphans} processes were left behind"
        if self.code in DOCUMENTED | {-signal.SIGKILL} and "Traceback (most recent call last)" not in self.output:
            return ""
        return f"{how(self.code)}: {self.last_lines()}"

    def unlike(self, codes: int | Iterable[int], *texts: str) -> str:
        """What is wrong, if it should have ended with one of these codes and printed these texts (in any case)."""
        expected = {codes} if isinstance(codes, int) else set(codes)
        if self.code not in expected:
            return f"{how(self.code)} instead of {' or '.join(map(str, sorted(expected)))}: {self.last_lines()}"
        missing = [text for text in texts if text.lower() not in self.output.lower()]
        return self.bug or (f"does not say '{missing[0]}': {self.last_lines()}" if missing else "")

    def last_lines(self, count: int = 3) -> str:
        """The end of what it printed, as one line."""
        return " / ".join(line.strip() for line in self.output.strip().splitlines()[-count:])


def how(code: int) -> str:
    """An exit status in words."""
    if code == HUNG:
        return "did not end in time"
    return f"ended by signal {-code}" if code < 0 else f"exit {code}"


@dataclass(frozen=True)
class Lab:
    """A folder that trials may use. It can be pickled: trials run in several processes."""

    folder: Path

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def data(self) -> Path:
        """A prepared data set."""
        return self.folder / "set"

    @property
    def run(self) -> Path:
        """A finished short training."""
        return self.folder / "run"

    def seconds(self, action: str) -> float:
        """How long an action takes when nothing goes wrong."""
        return float((self.folder / f"{action}.seconds").read_text())

    def room(self) -> Path:
        """A new empty folder for one trial."""
        rooms = self.folder / "rooms"
        rooms.mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(dir=rooms))

    @staticmethod
    def clear(room: Path) -> None:
        """Remove what a trial has made, also folders that it has closed to itself."""
        for folder in [room, *room.rglob("*")]:
            if folder.is_dir() and not folder.is_symlink():
                folder.chmod(0o700)
        shutil.rmtree(room)

    def diffkit(
        self,
        *arguments: object,
        here: Path | None = None,
        setup: Sequence[Setup] = (),
        send: tuple[int, float] | None = None,
        deadline: float = DEADLINE,
        environment: Mapping[str, str | None] | None = None,
    ) -> Outcome:
        """Run a command in the folder `here`; `send`: a signal, so many seconds after it has begun."""
        report = Path(tempfile.mkdtemp(dir=self.folder / "reports"))
        child = _Child(
            [os.fspath(word) if isinstance(word, Path) else str(word) for word in arguments],
            here or self.folder,
            report,
            tuple(setup),
            {"XDG_CACHE_HOME": str(self.folder / "cache"), "NO_COLOR": "1", "COLUMNS": "200", **(environment or {})},
        )
        context: Any = get_context("fork" if FORKS else "spawn")
        process = context.Process(target=child)
        begun = time.monotonic()
        process.start()
        if send is not None:
            while not _size(report / "marks") and process.exitcode is None:
                time.sleep(0.001)
            process.join(send[1])
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, send[0])
        process.join(max(0.1, deadline - (time.monotonic() - begun)))
        hung = process.exitcode is None
        if hung:
            process.kill()
            process.join()
        seconds, code = time.monotonic() - begun, HUNG if hung else int(process.exitcode or 0)
        marks = (report / "marks").read_text().split() if _size(report / "marks") else []
        output = (report / "output").read_text(errors="replace") if _size(report / "output") else ""
        outcome = Outcome(code, output, seconds, int(marks[1]) if len(marks) > 1 else 0, end_orphans())
        shutil.rmtree(report)
        return outcome


@dataclass(frozen=True)
class _Child:
    """The body of a command's process."""

    arguments: list[str]
    here: Path
    report: Path
    setup: tuple[Setup, ...]
    environment: Mapping[str, str | None]

    def __call__(self) -> None:
        if hasattr(os, "setsid"):
            os.setsid()  # what a terminal sends to the self-test does not reach its trials
        signal.signal(signal.SIGINT, signal.default_int_handler)
        faulthandler.disable()
        os.chdir(self.here)
        for name, value in self.environment.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _redirect(self.report / "output")
        marks = (self.report / "marks").open("ab", buffering=0)  # before `setup`, which may take the right to do so
        before = _peak_memory()
        try:
            for prepare in self.setup:
                prepare()
            from diffkit import cli

            sys.argv = ["diffkit", *self.arguments]
            marks.write(b"begun ")
            cli.main()
        finally:
            marks.write(str(_peak_memory() - before).encode())


def _redirect(output: Path) -> None:
    """Standard input from nothing, both outputs into a file, as under `nohup`."""
    sys.stdout.flush()
    sys.stderr.flush()
    for place, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (str(output), 1, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(place, flags, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.dup2(1, 2)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    for name, descriptor, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = open(descriptor, "w", buffering=1, closefd=False, encoding=encoding, errors=errors)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:
        return 0
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024
