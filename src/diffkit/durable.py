"""Every durable write: temporary name in the same folder, write, fsync, rename, fsync the folder.

One door, so that faults can be injected here: tests replace the primitives `write`, `sync` and `rename`.
"""

from __future__ import annotations

import atexit
import errno
import functools
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from diffkit.errors import DiffkitError, ExitCode

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_REFUSED.add(errno.ENAMETOOLONG)


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Primitive: all of `data` into an open file."""
    file.write(data)


def sync(descriptor: int) -> None:
    """Primitive: fsync."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Primitive: atomic replacement within one file system."""
    source.replace(target)


@contextmanager
def explained(path: Path, errors: frozenset[int] = frozenset(_NO_ROOM | _REFUSED)) -> Iterator[None]:
    """Turn the machine's refusals (disk full, read-only, no permission) into a DiffkitError with exit code 4."""
    try:
        yield
    except OSError as error:
        if error.errno not in errors:
            raise
        where = path if path.exists() else path.parent
        hint = "Choose another place with -o."
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            free = shutil.disk_usage(where if where.exists() else Path.cwd()).free
            hint = f"{free / 2**20:.0f} MiB are free there; make room or choose another place with -o."
        raise DiffkitError(
            f"Cannot write {path}: {os.strerror(error.errno or 0)}.", hint, code=ExitCode.MACHINE
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(file: BinaryIO) -> None:
    """Flush and fsync an open file."""
    file.flush()
    sync(file.fileno())


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Replace `path` by these bytes: afterwards either the old or the new content is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            with temporary.open("wb") as file:
                for piece in pieces:
                    write(file, piece)
                sync_file(file)
            rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add one JSON line. A torn last line (power cut) is dropped by `read_lines`, never glued to the next."""
    with explained(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                write(file, b"\n")
        write(file, (json.dumps(value, ensure_ascii=False) + "\n").encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; torn lines are passed over. A missing file is an empty list."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def sweep(folder: Path) -> None:
    """Remove everything half-written in a folder that the caller alone writes."""
    for stray in folder.glob(".*.tmp"):
        shutil.rmtree(stray) if stray.is_dir() else stray.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept between commands: ~/.cache/diffkit, or as XDG_CACHE_HOME says.

    Where that cannot be written, or the user has no home, a folder that goes with the process.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffkit"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return process_folder()
    return folder if writable(folder) else process_folder()


def writable(folder: Path) -> bool:
    """Whether this process may make files in a folder."""
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids)


@functools.cache
def process_folder() -> Path:
    """A temporary folder that is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="diffkit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def vacant(path: Path) -> bool:
    """Whether something new may be put there: it does not exist, or is an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _remove_stale(path: Path) -> None:
    """What builders of this folder left behind that were killed: untouched for ten minutes, and their process gone."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        number = stray.name.split(".")[-2]
        ours = number == str(os.getpid())
        if ours or (time.time() - stray.stat().st_mtime > 600 and not _alive(number)):
            shutil.rmtree(stray, ignore_errors=True)


def _alive(number: str) -> bool:
    if os.name == "nt" or not number.isdigit():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Build a folder under a temporary sibling name; it appears at `path` whole, or not at all.

    The caller fsyncs large files it writes itself with `sync_file`; smaller ones go through `write_bytes`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_stale(path)
    with explained(path):
        temporary.mkdir(parents=True)
    try:
        # The caller may also read inside: only want of room is surely about what is written here.
        with explained(path, frozenset(_NO_ROOM)):
            yield temporary
        with explained(path):
            sync_folder(temporary)
            rename(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
