"""The durable operations of a command, numbered in the order in which they begin; and the n-th of them made to fail.

Every durable write of diffkit goes through the primitives of `diffkit.durable`, which are replaced here, in a process
that exists for one trial. (The method is SQLite's: fail the first operation, then the second, until none is left.)
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

PRIMITIVES = ("create", "make_folder", "write", "sync", "rename", "remove")
Operation: TypeAlias = Callable[..., Any]
Kind: TypeAlias = Literal["kill", "torn", "full", "short", "error", "signal"]
"""`kill`: SIGKILL just before the operation. `torn`: half of a write, then SIGKILL. `full`: from here on, the disk is
full. `short`: half of a write, then the disk is full, once. `error`: EIO, once. `signal`: SIGTERM, just before."""


def replace_operations(around: Callable[[str, Operation, tuple[Any, ...]], Any]) -> None:
    """Have every durable operation of this process done by `around(name, operation, arguments)`."""
    from diffkit import durable

    def replaced(name: str, operation: Operation) -> Operation:
        return lambda *arguments: around(name, operation, arguments)

    for name in PRIMITIVES:
        if hasattr(durable, name):
            setattr(durable, name, replaced(name, getattr(durable, name)))


@dataclass(frozen=True)
class Count:
    """Note the name of each operation, a line each."""

    file: Path

    def __call__(self) -> None:
        lines = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def around(name: str, operation: Operation, arguments: tuple[Any, ...]) -> Any:
            os.write(lines, f"{name} {_place(arguments[0])}\n".encode(errors="replace"))
            return operation(*arguments)

        replace_operations(around)


@dataclass(frozen=True)
class Fault:
    """What happens at the n-th operation, counted from 1."""

    kind: Kind
    number: int

    def __call__(self) -> None:
        count, lock = 0, threading.Lock()

        def around(name: str, operation: Operation, arguments: tuple[Any, ...]) -> Any:
            nonlocal count
            with lock:
                count += 1
                due = count == self.number or (self.kind == "full" and count > self.number)
            if due:
                self._strike(name, operation, arguments)
            return operation(*arguments)

        replace_operations(around)

    def _strike(self, name: str, operation: Operation, arguments: tuple[Any, ...]) -> None:
        if self.kind in ("torn", "short") and name == "write":
            file, data = arguments
            operation(file, memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
            file.flush()
        if self.kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if (self.kind == "short" and name == "write") or (self.kind == "full" and name not in ("remove", "sync")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _place(argument: object) -> str:
    """What an operation is done to."""
    if isinstance(argument, int):
        return str(argument)
    return Path(str(getattr(argument, "name", argument))).name
