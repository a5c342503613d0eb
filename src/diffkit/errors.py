"""The one exception that users see, and the exit codes of the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path

from diffkit.names import shown


class ExitCode(IntEnum):
    """What the process returns; documented in docs/reliability.md."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    MACHINE = 4
    LOCKED = 5
    NON_FINITE = 6
    MODEL = 7
    RESUMABLE = 75
    OTHER_FAILED = 76
    INTERRUPTED = 130


class DiffkitError(Exception):
    """Something a user can mend: what is wrong, then (`hint`) the nearest right thing or the next command.

    Of several processes, the first speaks. `silent`: another one has said it, so this one does not; `personal`: only
    this one knows it, and speaks.
    """

    silent = personal = False

    def __init__(self, message: str, hint: str = "", *, code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"Did you mean 'karras'? "` for a near miss among `known`, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'? " if near else ""


def nearest_sibling(path: Path) -> str:
    """`did_you_mean` for a path that does not exist, among what lies beside it; or where the link leads that it is."""
    try:
        if path.is_symlink():
            return f"It is a link to {shown(str(path.readlink()))}, which cannot be reached. "
        return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()])
    except OSError:
        return ""
