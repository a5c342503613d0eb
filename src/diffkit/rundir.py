"""The run directory: what is where, who writes it, and one writer at a time."""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkit import durable
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
        return self.config.exists()

    def settings(self) -> Settings:
        """What config.toml says. Raises DiffkitError if it is damaged."""
        return validated(read_toml(self.config), str(self.config))

    def create(self, settings: Settings) -> None:
        """Begin a new run here. Raises DiffkitError if the folder already holds something else."""
        if self.exists:
            raise DiffkitError(f"{self.path} has just been begun by another process.", code=ExitCode.LOCKED)
        with durable.explained(self.path):
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.config, to_toml(settings))

    def check_free(self) -> None:
        """Raises DiffkitError if the folder holds anything that is neither a run nor what a start cut off left."""
        own = {self.checkpoints.name, self.samples.name, self.lock.name}
        if self.path.is_dir() and (self.exists or {entry.name for entry in self.path.iterdir()} <= own):
            return
        if self.path.exists():
            raise DiffkitError(
                f"{self.path} already holds something that is not a run.",
                "It is left as it is; choose another place with -o.",
            )

    def tidy(self) -> None:
        """Remove what a start that was killed left half-written; for the run's writer only."""
        for folder in (self.path, self.checkpoints, self.samples, self.snapshots):
            durable.sweep(folder)

    def add_metrics(self, record: dict[str, Any]) -> None:
        durable.append_line(self.metrics, record)

    def rewind_metrics(self, images_seen: int) -> None:
        """Drop what was measured after the checkpoint that training goes on from: it will be measured again."""
        records = durable.read_lines(self.metrics)
        kept = [record for record in records if record.get("images", 0) <= images_seen]
        if len(kept) < len(records):
            durable.write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer. Raises DiffkitError (exit code 5) naming the process that is."""
        with durable.explained(self.lock):
            self.path.mkdir(parents=True, exist_ok=True)
            opened = self.lock.open("a+")
        with opened as file:
            if not _lock(file.fileno()):
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
            yield


def _holder(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "another process"


def _lock(descriptor: int) -> bool:
    """The kernel drops it when the process ends, however it ends. (Without fcntl, as on Windows: no lock.)"""
    try:
        import fcntl
    except ImportError:
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
    return next(path for path in numbered(base) if not path.exists())
