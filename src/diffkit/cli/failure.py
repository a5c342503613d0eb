"""How a command ends that did not simply succeed: a few lines on standard error, and an exit code."""

from __future__ import annotations

import errno
import os
import re
import sys

from diffkit.cli.console import err, plain
from diffkit.errors import DiffkitError, ExitCode

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
UNMAPPED = re.compile("failed to map segment|cannot allocate memory", re.IGNORECASE)
"""What the dynamic linker says when a library does not fit into memory."""


def explained(error: BaseException, *, interrupted: bool) -> int:
    """Say what went wrong, and return the exit code. `interrupted`: a signal has asked for the end."""
    if isinstance(error, SystemExit):
        failed = None if interrupted else _part_failed(error)
        if failed is None:
            return _exit_code(error, interrupted)
        error = failed
    # An interruption that comes within an import or an extension may end as an exception of another kind.
    if interrupted or isinstance(error, KeyboardInterrupt):
        err.print("Interrupted.")
        return int(ExitCode.INTERRUPTED)
    if getattr(error, "silent", False):
        return int(error.code) if isinstance(error, DiffkitError) else int(ExitCode.BUG)
    known = as_diffkit_error(error) or _part_failed(error)
    if known is None:
        return _bug(error)
    # What is wrong with the command, or with the data, the first of several processes says for all.
    common = known.code in {ExitCode.USAGE, ExitCode.DATA}
    err.quiet = err.quiet and common and not known.personal
    _trace(error)
    err.print("[bold red]Error:[/] " + plain(known.message), highlight=False)
    if known.hint:
        err.print(plain(known.hint), highlight=False)
    return int(known.code)


def as_diffkit_error(error: BaseException) -> DiffkitError | None:
    """The error itself, or what an exception that nobody has foreseen says about the machine or the input; else None.

    A last net: whoever knows more about the case raises a DiffkitError of their own.
    """
    if isinstance(error, DiffkitError):
        return error
    if _is_memory(error):
        hint = "Close other programs, or ask for less at once: a smaller --batch-size, --size or -n."
        return DiffkitError("This machine has too little free memory for that.", hint, code=ExitCode.MACHINE)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_the_system(error)
    if isinstance(error, RecursionError):
        return DiffkitError("Something in the input is nested too deeply.")
    if isinstance(error, OverflowError):
        return DiffkitError(f"A number in the input is too large: {error}.")
    if isinstance(error, UnicodeError):
        return DiffkitError(f"A text or a name in the input cannot be read or written as it is: {error}.")
    return None


def _part_failed(error: BaseException) -> DiffkitError | None:
    """The error as that of an installed part, if it was raised in the code of one."""
    from diffkit.registry import loaded, word

    parts = [part for part in loaded() if not part.builtin]
    if not parts:
        return None
    from diffkit.compose.culprit import culprit

    found = culprit(error, parts)
    if found is None:
        return None
    part, cause = found
    said = f"{type(cause).__name__}: {cause}".rstrip(": .")
    failed = DiffkitError(
        f"The {word(part.kind)} '{part.name}' of the plugin {part.distribution} {part.version} failed: {said}.",
        "Report it to its authors, with what `diffkit --debug ...` prints.",
        code=ExitCode.BUG,
    )
    failed.__cause__ = error
    return failed


def _of_the_system(error: OSError) -> DiffkitError:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    where = f"Cannot use {' and '.join(names)}" if names else "The system refused an operation"
    if error.errno in NO_ROOM:
        hint = "Make room on the disk, or choose another place."
    elif error.errno in {errno.EACCES, errno.EPERM}:
        hint = "Ask whoever owns it for the permission, or choose another place."
    else:
        hint = "diffkit --debug shows where it happened."
    reason = os.strerror(error.errno or 0)
    return DiffkitError(f"{where}: {reason}.", hint, code=ExitCode.MACHINE)


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, ImportError | OSError) and UNMAPPED.search(str(error))):
        return True
    if "torch" not in sys.modules or not isinstance(error, Exception):
        return False
    from diffkit.engine.devices import is_memory

    return is_memory(error)


def _exit_code(end: SystemExit, interrupted: bool) -> int:
    if isinstance(end.code, str):
        err.print(plain(end.code), highlight=False)
        return int(ExitCode.BUG)
    code = int(end.code or 0)
    if interrupted and code == ExitCode.INTERRUPTED:
        err.print("Interrupted.")
    return code


def _bug(error: BaseException) -> int:
    err.quiet = False
    if not _trace(error):
        err.print(f"[bold red]Bug:[/] {type(error).__name__}: " + plain(str(error)), highlight=False)
        err.print("This should not happen. Please report it with what [bold]diffkit --debug ...[/] prints.")
    return int(ExitCode.BUG)


def _trace(error: BaseException) -> bool:
    """Print the traceback, if --debug asks for it."""
    if os.environ.get("DIFFKIT_DEBUG", "") in {"", "0"}:
        return False
    from rich.traceback import Traceback

    err.print(Traceback.from_exception(type(error), error, error.__traceback__))
    return True
