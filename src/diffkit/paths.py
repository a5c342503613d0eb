"""What is at a path. Where that cannot be known an error says so; `Path.exists` says "nothing" from Python 3.14 on."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from diffkit.errors import DiffkitError, ExitCode

_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EBADF}


def exists(path: Path) -> bool:
    """Whether anything is there. Raises DiffkitError (exit code 4), as all of these, where that cannot be known."""
    return _mode(path) is not None


def is_file(path: Path) -> bool:
    """Whether a file is there."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: Path) -> bool:
    """Whether a folder is there."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def unreadable(path: Path, error: OSError) -> DiffkitError:
    """The error for a path that the system does not let us read."""
    if error.errno in {errno.EACCES, errno.EPERM}:
        return DiffkitError(
            f"No permission to read {path}.",
            "Ask its owner for it, or run the command as a user who has it.",
            code=ExitCode.MACHINE,
        )
    reason = os.strerror(error.errno) if error.errno else str(error)
    return DiffkitError(f"Cannot read {path}: {reason}.", "Check the disk it is on.", code=ExitCode.MACHINE)


def _mode(path: Path) -> int | None:
    """The kind of file at the end of all links; None for nothing."""
    try:
        return path.stat().st_mode
    except OSError as error:
        if error.errno in _NOTHING:
            return None
        raise unreadable(path, error) from error
    except ValueError:  # a null character
        return None
