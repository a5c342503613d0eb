"""What ends a command from outside: Ctrl-C, a scheduler, a terminal that is closed."""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from diffkit.errors import ExitCode

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
ONE_SIGNAL = 0.5
"""Seconds within which two signals are one: a terminal, or `timeout`, may send it twice."""
AGAIN = 0.002
LONGEST_IMPORT = 10.0
"""Seconds for which a signal waits until modules that are being imported are there: an exception that is raised amid
torch's is lost at times, or aborts the process."""


class Signals:
    """The first of these signals calls `first`; a later one ends the process at once.

    A launcher passes on what the terminal has sent to all: two within a moment are one. A SIGHUP that was ignored at
    the start (nohup) stays ignored.
    """

    def __init__(self, first: Callable[[], object]) -> None:
        self._first = first
        self._since: float | None = None
        self._resent = False
        self._code = int(ExitCode.INTERRUPTED)
        self._before: dict[int, Any] = {}

    @property
    def came(self) -> bool:
        """Whether there has been one."""
        return self._since is not None

    def install(self) -> None:
        for name in NAMES:
            number = getattr(signal, name, None)
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                continue
            self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def finish(self, code: int) -> None:
        """Nothing is half done any more: a signal from here on ends the process at once, with this code."""
        self._code, self._first = code, lambda: os._exit(code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._since is None or self._resent:
            self._since = self._since or time.monotonic()
            self._resent = False
            if _importing(frame) and time.monotonic() - self._since < LONGEST_IMPORT:
                self.again_soon()
            else:
                self._first()
        elif time.monotonic() - self._since > ONE_SIGNAL:
            os._exit(self._code)

    def ignore(self) -> None:
        """To the very end of the process, where Python would put back handlers that kill."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def again_soon(self) -> None:
        """Let the first one come once more: where it came, it cannot be raised."""
        timer = threading.Timer(AGAIN, self._again)
        timer.daemon = True
        timer.start()

    def _again(self) -> None:
        self._resent = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:
            _thread.interrupt_main()


def _importing(frame: FrameType | None) -> bool:
    """Whether this is amid an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def interrupting() -> Signals:
    """Signals that do what Ctrl-C does in any Python program, so that what is half done is cleaned up."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def unraisable(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not None and issubclass(lost.exc_type, KeyboardInterrupt):
            signals.again_soon()
        else:
            report(lost)

    signals = Signals(interrupt)
    signals.install()
    atexit.register(signals.ignore)
    # In a destructor or a callback of an import Python prints an exception and goes on.
    report, sys.unraisablehook = sys.unraisablehook, unraisable
    return signals
