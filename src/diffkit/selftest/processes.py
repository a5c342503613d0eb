"""No process outlives its trial: what a command leaves behind is found and ended. (On Linux; else nobody looks.)"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

PATIENCE = 5.0
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def adopt_orphans() -> None:
    """Become the parent of whatever this process's children leave behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [each for child in map(int, children) for each in (child, *descendants(child))]


def command_of(pid: int) -> list[str]:
    """The words that a process was started with; none if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def end_orphans() -> int:
    """Wait a little for this process's descendants to end by themselves, and end the others; returns their number."""
    deadline = time.monotonic() + PATIENCE
    while _reaped(descendants(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    ended: set[int] = set()
    while left := _reaped(descendants(os.getpid())):
        kill(left)
        ended |= set(left)
        time.sleep(0.01)
    return len(ended)


def kill(pids: Iterable[int]) -> None:
    """Kill those that have not ended meanwhile."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _reaped(pids: list[int]) -> list[int]:
    """Those that have not ended."""
    living = []
    for pid in pids:
        try:
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                living.append(pid)
        except ChildProcessError:  # not a child of this process, but of one of them
            if Path(f"/proc/{pid}").exists():
                living.append(pid)
    return living
