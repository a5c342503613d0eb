"""The run directory: what is where, who writes it, and one writer at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkit import durable, paths
from diffkit.config import Settings, read_toml, to_toml, validated
from diffkit.errors import DiffkitError, ExitCode


@dataclass(frozen=True)
class RunDir:
    """Paths of a run, and its small records."""

    path: Path

    @property
    def config(self) -> Path:
        """Write-once: the resolved settings."""
        return self.path / "config.toml"

    @property
    def sessions(self) -> Path:
        """One line for each start: what it changed (length, device, cadence)."""
        return self.path / "sessions.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One line for each `diffkit evaluate` of the run."""
        return self.path / "evaluations.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Averages of the weights along the way, for `diffkit ema`."""
        return self.path / "snapshots"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def best(self) -> Path:
        """The model with the lowest held-out loss so far."""
        return self.path / "best.safetensors"

    @property
    def lock(self) -> Path:
        return self.path / "run.lock"

    @property
    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return paths.is_file(self.config)

    def config_sha256(self) -> str:
        """Of config.toml, which each checkpoint records: the two belong together."""
        return hashlib.sha256(self.config.read_bytes()).hexdigest()

    def settings(self) -> Settings:
        """What config.toml says. Raises DiffkitError if it is damaged."""
        return validated(read_toml(self.config), str(self.config))

    @property
    def traces(self) -> list[str]:
        """The names of what only a training that has begun leaves here, checkpoints aside."""
        left = (self.sessions, self.metrics, self.model, self.best, self.snapshots, self.samples)
        return [path.name for path in left if os.path.lexists(path) and not self._is_rest(path.name)]

    def lay_out(self) -> None:
        """Make the folders and the empty files of a run that are not there yet; until `create` it has not begun."""
        for folder in (self.path, self.checkpoints, self.samples):
            durable.make_folders(folder)
        if not os.path.lexists(self.metrics):
            durable.write_bytes(self.metrics)

    def create(self, settings: Settings) -> None:
        """Begin the run; the caller holds its lock, under which it did not exist."""
        durable.write_text(self.config, to_toml(settings))

    def check_free(self) -> None:
        """Raises DiffkitError if the folder holds anything that is neither a run nor what a start cut off left."""
        if not os.path.lexists(self.path) or self.exists:
            return
        others = ["."] if not os.path.isdir(self.path) else [n for n in os.listdir(self.path) if not self._is_rest(n)]
        if self.checkpoints.name in others or set(self.traces) & set(others):
            raise DiffkitError(
                f"{self.path} holds a run without its {self.config.name}.",
                "Restore that file, or choose another place with -o.",
                code=ExitCode.MODEL,
            )
        if others:
            raise DiffkitError(
                f"{self.path} already holds something that is not a run.",
                "It is left as it is; choose another place with -o.",
            )

    def _is_rest(self, name: str) -> bool:
        """Whether a start that was cut off before it had begun a run may have left this."""
        if name == self.lock.name or durable.is_temporary(name):
            return True
        if name == self.metrics.name:
            return not self.metrics.stat().st_size
        return name in {self.checkpoints.name, self.samples.name, self.snapshots.name} and _is_empty(self.path / name)

    def check_writable(self) -> None:
        """Raises DiffkitError (exit code 4) unless files can be made in every folder that training writes."""
        for folder in (self.path, self.checkpoints, self.samples):
            if os.path.isdir(folder):
                probe = durable.temporary_name(folder / "probe")
                with durable.explained(folder):
                    probe.touch()
                    probe.unlink()

    def tidy(self) -> None:
        """Remove what a start that was killed left half-written; for the run's writer only."""
        for folder in (self.path, self.checkpoints, self.samples, self.snapshots):
            durable.sweep(folder)

    def add_metrics(self, record: dict[str, Any]) -> None:
        durable.append_line(self.metrics, record)

    def rewind_metrics(self, images_seen: int) -> None:
        """Drop what was measured after the checkpoint that training goes on from: it will be measured again."""
        records = durable.read_lines(self.metrics)
        kept = [record for record in records if not _is_later(record, images_seen)]
        if len(kept) < len(records):
            durable.write_lines(self.metrics, kept)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer. Raises DiffkitError (exit code 5) naming the process that is.

        The folder itself is locked, which nobody deletes by mistake; run.lock only says who holds it. A folder that is
        made for the lock goes again if no run is begun in it.
        """
        made = not os.path.lexists(self.path)
        durable.make_folders(self.path)
        with durable.explained(self.lock), ExitStack() as stack:
            held = stack.enter_context(_descriptor(self.path))
            file = stack.enter_context(self.lock.open("a+"))
            if not (_lock(held) and _lock(file.fileno())):
                file.seek(0)
                raise DiffkitError(
                    f"{self.path} is being trained by {_holder(file.read())}.",
                    "Wait for it, stop it, or choose another place with -o.",
                    code=ExitCode.LOCKED,
                )
            file.truncate(0)
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            file.write(json.dumps(holder))
            file.flush()
            stack = stack.pop_all()
        with stack:
            try:
                yield
            finally:
                if not self.exists:
                    self._abandon(made)

    def _abandon(self, made: bool) -> None:
        """Take back what `locked` has put into a folder in which no run was begun."""
        with suppress(OSError):
            self.lock.unlink()
            if made:
                self.path.rmdir()


@contextmanager
def _descriptor(folder: Path) -> Iterator[int | None]:
    """A folder opened to be locked; None where that cannot be (Windows)."""
    if os.name == "nt":
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_later(record: dict[str, Any], images_seen: int) -> bool:
    images = record.get("images")
    return isinstance(images, int | float) and images > images_seen


def _is_empty(path: Path) -> bool:
    return os.path.isdir(path) and all(map(durable.is_temporary, os.listdir(path)))


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _lock(descriptor: int | None) -> bool:
    """The kernel drops it when the process ends, however it ends. (Without fcntl, as on Windows: no lock.)"""
    try:
        import fcntl
    except ImportError:
        return True
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def numbered(base: Path) -> Iterator[Path]:
    """`base`, `base-2`, `base-3`, ..."""
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")


def unused(base: Path) -> Path:
    """The first of these that does not exist."""
    return next(path for path in numbered(base) if not os.path.lexists(path))
