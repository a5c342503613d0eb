"""Standard output and error that never fail: the work is what counts, whoever reads about it.

A reader that leaves, a full disk, a closed terminal, a closed descriptor or an encoding without our characters costs
the text, not the work. Everything printed goes through here, by whatever library.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PATIENCE = 1.0
"""Seconds that a message waits for a reader that has stopped; later ones wait no more until it reads again."""
PIECE = getattr(select, "PIPE_BUF", 512)
"""Bytes that a pipe which is ready takes at once."""

SIZES = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
"""Sizes of a terminal that Rich and Typer take from the environment, and fail on if they are no numbers."""


class Stream(io.RawIOBase):
    """An open descriptor, whose failing writes are dropped.

    With `patience` (seconds) a reader that has stopped is not waited for either; without, it is, as by any program.
    """

    def __init__(self, descriptor: int, patience: float | None) -> None:
        self._file = io.FileIO(_opened_anew(descriptor), "w", closefd=False)
        self._patience = patience
        self._stuck = False
        self.full = False
        """Whether something was dropped because the disk is full."""

    def write(self, data: ReadableBuffer, /) -> int:
        return self.offer(data, self._patience)

    def offer(self, data: ReadableBuffer, patience: float | None) -> int:
        """Write what can be written; returns the length of all."""
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view) and self._ready(patience):
                done += self._file.write(view[done : done + PIECE]) or 0
        except OSError as error:
            self.full |= error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        return len(view)

    def _ready(self, patience: float | None) -> bool:
        if not hasattr(select, "poll"):
            return True
        poll = select.poll()
        poll.register(self._file, select.POLLOUT)
        if self._stuck:
            patience = 0
        self._stuck = not poll.poll(None if patience is None else patience * 1000)
        return not self._stuck

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()


def protect() -> None:
    """Make the standard streams of this process ones that never fail."""
    global _data, _messages
    for name in SIZES:
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "1")):
            del os.environ[name]
    _occupy()
    if os.name == "nt":
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return
    # Streams that somebody has put in place of the interpreter's own are theirs to look after.
    if sys.stdout is sys.__stdout__:
        _data = Stream(1, None)
        sys.stdout = _text(_data, sys.stdout)
    if sys.stderr is sys.__stderr__:
        _messages = Stream(2, PATIENCE)
        sys.stderr = _text(_messages, sys.stderr, line_buffering=True)


def reserve(wanted: bool = True) -> bool:
    """Keep standard output for `data`: what else is printed, by a part for instance, becomes a message. With
    `--json`, whose callback this is."""
    global _reserved
    if wanted:
        _reserved = sys.stdout
        own = _messages is not None and _reserved is not sys.__stdout__
        sys.stdout = _text(Stream(2, PATIENCE), sys.stderr, line_buffering=True) if own else sys.stderr
    return wanted


def data() -> TextIO:
    """Where data are printed."""
    return sys.stdout if _reserved is None else _reserved


def finish() -> None:
    """Write what is still to be written. Print a message if the disk was too full for some of it."""
    global _reserved
    with suppress(ValueError, AttributeError):  # closed by a part
        data().flush()
    if _reserved is not None:
        _reserved, sys.stdout = None, _reserved
    if _data is not None and _data.full:
        print("Standard output is incomplete: no space left on the disk.", file=sys.stderr)


def notify(text: str) -> None:
    """A message out of a signal handler: at once, or not at all."""
    if _messages is not None:
        _messages.offer(text.encode("ascii", "backslashreplace"), 0)


_reserved: TextIO | None = None
_data: Stream | None = None
_messages: Stream | None = None


def _text(stream: Stream, before: TextIO | None, line_buffering: bool = False) -> TextIO:
    """A text stream with the encoding of the one before; what that cannot express is written as an escape."""
    encoding = before.encoding if before is not None else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=line_buffering or stream.isatty(),
    )


def _opened_anew(descriptor: int) -> int:
    """A terminal opened once more, so that it alone does not block: it shares its mode with the shell otherwise."""
    with suppress(OSError, AttributeError):
        if os.isatty(descriptor):
            return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    return descriptor


def _occupy() -> None:
    """Standard descriptors that are closed lead nowhere, here and in the processes that we start.

    Otherwise the next file that is opened would take their place.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
