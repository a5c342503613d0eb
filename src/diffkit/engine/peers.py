"""How processes that work as one notice that another has failed or hangs.

Each says once a second, in the store where they met: how many meetings (messages to all) it has come to, how much
processor time it has used, and for how long it may use none. Who waits for the others in a meeting reads this. A
process that is late, and has used no processor time for as long as it may, hangs: it is stopped, deadlocked, or waits
for a disk that does not answer. One that computes may take as long as it needs.

While a GPU waits for a message, the thread that speaks looks at the others too (see `guard`). Whether one of them has
sent its part cannot be seen there, so that one that says nothing any more is taken to have ended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from diffkit.engine.guard import Guard
from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, Work

SECOND = timedelta(seconds=1)
IDLE, IDLE_AT_REST = 15, 600
"""Seconds without processor time after which a process hangs: while `computing`, and while it may also be waiting for
disks, networks or compilers."""
IN_TIME = 2
"""Seconds that a message may take before the store is asked whether the others are still there."""
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
    """What was last seen of another process: processor time or beats, and how often it was the same."""

    value: float
    times: int = 0


class Peers:
    """What this process says of itself and hears of the others, over connections of its own to the store."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._idle = patience()
        self._meetings, self._may_idle, self._beats = 0, max(self._idle, IDLE_AT_REST), 0
        self._guard = Guard()
        self._error: OtherFailed | None = None
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
                    raise self._ended(error) from error
            self._look_at_others(self._store, late)

    def queue(self, begin: Callable[[], Work | None]) -> Work:
        """Begin a message between GPUs, a meeting that nobody waits for: it is watched until it has arrived."""
        self._meetings += 1
        return self._guard.queue(begin)

    def fails(self) -> bool:
        """Let the others know that this process fails; whether it is the first to."""
        try:
            return self._store.compare_set(FAILURE, "", str(self.rank)) == str(self.rank).encode()
        except RuntimeError:
            return False  # the store has gone with the process that kept it

    def _ended(self, error: RuntimeError) -> Exception:
        """The error of a message as that of the process it did not reach, unless it is want of memory here."""
        from diffkit.engine.devices import is_memory

        return error if is_memory(error) else OtherFailed(f"Another process has ended ({error}).")

    def _look_at_others(self, store: Store, late: dict[int, _Seen], beats: dict[int, _Seen] | None = None) -> None:
        """Raises OtherFailed if one has failed or hangs, or, with `beats`, says nothing for some seconds.

        `late` and `beats`: what was seen before in this meeting.
        """
        try:
            if store.check([FAILURE]):
                raise OtherFailed(f"Rank {store.get(FAILURE).decode()} of {self.size} has failed.")
            for rank in range(self.size):
                if rank != self.rank:
                    self._look_at(rank, store.get(_key(rank)), late, beats)
        except RuntimeError as error:
            raise _no_answer(error) from error

    def _look_at(self, rank: int, said: bytes, late: dict[int, _Seen], beats: dict[int, _Seen] | None) -> None:
        meetings, used, may_idle, beat = said.split()
        # Not seconds are counted, but looks: what passes while this process itself is stopped does not count.
        if beats is not None:
            heard = beats.setdefault(rank, _Seen(float(beat)))
            heard.times += 1
            if float(beat) != heard.value:
                beats[rank] = _Seen(float(beat))
            elif heard.times > self._idle:
                raise self._lost(
                    f"Rank {rank} of {self.size} has ended or hangs: it was silent for {self._idle} seconds."
                )
        if int(meetings) >= self._meetings:
            return
        seen = late.setdefault(rank, _Seen(float(used)))
        seen.times += 1
        if float(used) - seen.value > BUSY * seen.times:
            late[rank] = _Seen(float(used))
        elif seen.times > int(may_idle):
            raise self._lost(
                f"Rank {rank} of {self.size} hangs: the others have waited for it for {int(may_idle)} seconds, in "
                "which it has used no processor time."
            )

    def _lost(self, message: str) -> OtherFailed:
        """The error, remembered: the thread that has it may not come to say it."""
        hint = "All end; what was saved stands. DIFFKIT_PATIENCE=60 waits longer, as for a slow disk."
        error = OtherFailed(message, hint)
        error.personal = self.fails()
        error.silent = not error.personal
        self._error = self._error or error
        return error

    def _keep_saying(self, store: Store) -> None:
        late: dict[int, _Seen] = {}
        beats: dict[int, _Seen] = {}

        def check(seconds: int) -> None:
            if seconds == 0:
                late.clear()
                beats.clear()
            if self._error is not None:
                raise self._error
            if seconds >= IN_TIME:
                self._look_at_others(store, late, beats)

        answers = True
        while not self._over.wait(SECOND.total_seconds()):
            try:
                if answers:
                    self._say(store)
            except RuntimeError as error:
                answers = False
                self._error = self._error or _no_answer(error)
            self._guard.look(check)

    def _say(self, store: Store) -> None:
        self._beats += 1
        store.set(_key(self.rank), f"{self._meetings} {time.process_time():.3f} {self._may_idle} {self._beats}")


def patience() -> int:
    """Seconds that a process which should be computing may be idle. Raises DiffkitError if they are set wrongly."""
    text = os.environ.get(PATIENCE, str(IDLE))
    if not text.isdecimal() or not int(text):
        raise DiffkitError(f"{PATIENCE} must be a whole number of seconds, at least 1, got '{text}'.")
    return int(text)


def _no_answer(error: RuntimeError) -> OtherFailed:
    return OtherFailed(f"The process that keeps the common store does not answer ({error}).")


def _key(rank: int) -> str:
    return f"peer-{rank}"
