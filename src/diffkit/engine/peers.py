"""How processes that work as one notice that another has failed or hangs.

Each says once a second, in the store where they met: how many meetings (messages to all) it has come to, how much
processor time it has used, and for how long it may use none. Who waits for the others in a meeting reads this. A
process that is late, and has used no processor time for as long as it may, hangs: it is stopped, deadlocked, or waits
for a disk that does not answer. One that computes may take as long as it needs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, Work

SECOND = timedelta(seconds=1)
IDLE, IDLE_AT_REST = 15, 600
"""Seconds without processor time after which a process hangs: while `computing`, and while it may also be waiting for
disks, networks or compilers."""
PATIENCE = "DIFFKIT_PATIENCE"
"""The environment variable that sets another number than `IDLE`."""
BUSY = 0.05
"""Of a second of processor time: less is none."""
FAILURE = "failure"


class OtherFailed(DiffkitError):
    """Another process of this world has failed or hangs. It has said why, or (`personal`) this one says it."""

    silent = True

    def __init__(self, message: str, hint: str = "", *, code: ExitCode = ExitCode.OTHER_FAILED) -> None:
        super().__init__(message, hint, code=code)


@dataclass
class _Seen:
    """What was last seen of a late process: its processor time, and how often it was the same."""

    used: float
    times: int = 0


class Peers:
    """What this process says of itself and hears of the others, over connections of its own to the store."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._idle = patience()
        self._meetings, self._may_idle = 0, max(self._idle, IDLE_AT_REST)
        self._store, mouth = store.clone(), store.clone()
        for connection in (self._store, mouth):
            connection.set_timeout(timedelta(seconds=self._idle))
        self._over = threading.Event()
        self._say(mouth)
        threading.Thread(target=self._keep_saying, args=(mouth,), name="peers", daemon=True).start()

    def close(self) -> None:
        """Say nothing more."""
        self._over.set()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, this process uses its processor, and hangs if it does not for some seconds."""
        before, self._may_idle = self._may_idle, self._idle
        try:
            yield
        finally:
            self._may_idle = before

    def wait(self, work: Work) -> None:
        """Until all have come to this meeting. Raises OtherFailed when one of them cannot."""
        self._meetings += 1
        late: dict[int, _Seen] = {}
        while True:
            try:
                work.wait(SECOND)
                return
            except RuntimeError as error:
                if work.is_completed():
                    raise OtherFailed(f"Another process has ended ({error}).") from error
            try:
                self._look_at_others(late)
            except RuntimeError as error:
                raise OtherFailed(f"The process that keeps the common store does not answer ({error}).") from error

    def fails(self) -> bool:
        """Let the others know that this process fails; whether it is the first to."""
        try:
            return self._store.compare_set(FAILURE, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:
            return False  # the store has gone with the process that kept it

    def _look_at_others(self, late: dict[int, _Seen]) -> None:
        """Raises OtherFailed if one has failed or hangs. `late`: what was seen before in this meeting."""
        if self._store.check([FAILURE]):
            raise OtherFailed(f"Rank {self._store.get(FAILURE).decode()} of {self.size} has failed.")
        for rank in range(self.size):
            meetings, used, may_idle = self._store.get(_key(rank)).split()
            if rank == self.rank or int(meetings) >= self._meetings:
                continue
            seen = late.setdefault(rank, _Seen(float(used)))
            seen.times += 1  # and not seconds: what passes while this process itself is stopped is not counted
            if float(used) - seen.used > BUSY * seen.times:
                late[rank] = _Seen(float(used))
            elif seen.times > int(may_idle):
                raise self._hangs(rank, int(may_idle))

    def _hangs(self, rank: int, seconds: int) -> OtherFailed:
        error = OtherFailed(
            f"Rank {rank} of {self.size} hangs: the others have waited for it for {seconds} seconds, in which it has "
            "used no processor time.",
            "All end; what was saved stands. DIFFKIT_PATIENCE=60 waits longer, as for a slow disk.",
        )
        error.personal = self.fails()
        error.silent = not error.personal
        return error

    def _keep_saying(self, store: Store) -> None:
        with suppress(RuntimeError):
            while not self._over.wait(SECOND.total_seconds()):
                self._say(store)

    def _say(self, store: Store) -> None:
        store.set(_key(self.rank), f"{self._meetings} {time.process_time():.3f} {self._may_idle}")


def patience() -> int:
    """Seconds that a process which should be computing may be idle. Raises DiffkitError if they are set wrongly."""
    text = os.environ.get(PATIENCE, str(IDLE))
    if not text.isdecimal() or not int(text):
        raise DiffkitError(f"{PATIENCE} must be a whole number of seconds, at least 1, got '{text}'.")
    return int(text)


def _key(rank: int) -> str:
    return f"peer-{rank}"
