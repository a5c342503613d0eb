"""Messages between GPUs, watched: a process whose GPU waits for one that can no longer arrive is ended.

Such a message is only queued. A GPU that has come to it waits until all have sent their parts, and whatever asks that
GPU for a number waits as long: up to the hour after which NCCL gives up, if a process has died without sending. The
message is not aborted (`ncclCommAbort`): the kernels queued behind it would go on with half a sum and change the
weights by it. Ending the process frees the GPU, and what was saved stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Work

GRACE = 8
"""Seconds that a message has left to arrive once it is known that a process has failed."""


class Guard:
    """The last message queued, which arrives after all before it. One thread queues, another looks once a second."""

    def __init__(self) -> None:
        self._connecting = False
        self._queued: Work | None = None
        self._watched: Work | None = None
        self._seconds = self._doomed = 0

    def queue(self, begin: Callable[[], Work | None]) -> Work:
        """Begin a message, and watch it until it has arrived. The first one waits for all, to connect their GPUs."""
        self._connecting = True
        try:
            work = begin()
        finally:
            self._connecting = False
        assert work is not None
        self._queued = work
        return work

    def look(self, check: Callable[[int], None]) -> None:
        """Called once a second; `check`, given the seconds that a message has been late, raises DiffkitError if it
        cannot arrive any more. It may still be on its way then; if it is not, this process ends.
        """
        late = self._connecting or (self._queued is not None and not self._queued.is_completed())
        if not late or self._queued is not self._watched:
            self._watched, self._seconds, self._doomed = self._queued, 0, 0
        if not late:
            return
        try:
            check(self._seconds)
            self._doomed = 0
        except DiffkitError as error:
            self._doomed += 1
            if self._doomed > GRACE:
                _end(error)
        self._seconds += 1


def _end(error: DiffkitError) -> NoReturn:
    """Say what is wrong, if nobody else does, and end: the thread that might do so waits for the GPU."""
    if error.personal or not error.silent:
        os.write(2, f"Error: {error}\n".encode())
    os._exit(int(error.code))
