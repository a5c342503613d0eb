"""Trainings that share processors take turns with them.

The threads of a step wait for each other hundreds of times. Where two trainings run at once, each as many threads as
there are processors, the scheduler knows nothing of this: one thread runs while the one it waits for does not, and both
trainings are several times slower than one after the other would be. So each computes alone for 0.3 seconds.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SLICE = 0.3
"""Seconds for which a training keeps the processors while another waits."""
PATIENCE = 30.0
"""Seconds that it waits for another that keeps them longer, because it makes samples, say, or has been halted."""
AGAIN = 10 * PATIENCE
"""Seconds before it waits for such a one again."""
POLL = 0.001
PROCESSORS = Path("/sys/devices/system/cpu")


class Turns:
    """The turn of this process with some processors. Used as a context, which gives it back.

    Two locks on what the kernel shows of the first of them: one for the turn, one for the head of the queue. The kernel
    frees them when the process ends. Without processors, or where the kernel shows none (not Linux), nothing is done.
    """

    def __init__(self, processors: Collection[int], folder: Path = PROCESSORS) -> None:
        self._turn = self._queue = -1
        self._held = False
        self._until = self._impatient_until = 0.0
        if fcntl is not None and processors:
            first = folder / f"cpu{min(processors)}"
            with suppress(OSError):
                self._queue = os.open(first / "topology", os.O_RDONLY)
                self._turn = os.open(first, os.O_RDONLY)

    def take(self) -> None:
        """Called before each step: go on with the turn, or wait for it. Where it does not come, go on without."""
        now = time.monotonic()
        if self._turn < 0 or (self._held and now < self._until):
            return
        if not self._held or self._others_wait():
            self._give_back()
            deadline = now + PATIENCE if now >= self._impatient_until else now
            if self._acquire(self._queue, deadline):
                self._held = self._acquire(self._turn, deadline)
                _release(self._queue)
            if not self._held and deadline > now:
                self._impatient_until = time.monotonic() + AGAIN
        self._until = time.monotonic() + SLICE

    def _others_wait(self) -> bool:
        if _try(self._queue):
            _release(self._queue)
            return False
        return True

    def _acquire(self, lock: int, deadline: float) -> bool:
        while not _try(lock):
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        return True

    def _give_back(self) -> None:
        if self._held:
            _release(self._turn)
            self._held = False

    def __enter__(self) -> Turns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()


def turns(device: torch.device, processes: int = 1) -> Turns:
    """Those of a training: with the processors this process may run on, if two trainings would not fit there.

    Processes that share a training wait for each other already, and on a GPU it is not the processors that count.
    """
    if device.type == "cpu" and processes == 1 and hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        if 1 < len(allowed) < 2 * torch.get_num_threads():
            return _of(os.getpid(), frozenset(allowed))
    return Turns(())


@cache
def _of(process: int, processors: frozenset[int]) -> Turns:
    """One for all trainings of a process, which do not wait for each other."""
    return Turns(processors)


def _try(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it
        return False
    return True


def _release(lock: int) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)
