"""Every durable write: temporary name in the same folder, write, fsync, rename, fsync the folder.

All of them pass through six primitives, `create`, `write`, `sync`, `rename`, `remove` and `make_folder`, which are
looked up when they are called: whoever replaces them can count operations, fail any of them, or record them all.
"""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

from diffkit.errors import DiffkitError, ExitCode
from diffkit.names import bytes_text

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_IN_THE_WAY = frozenset({errno.EEXIST, errno.ENOTEMPTY})
_SYNCERS = 16
_LONGEST = 60  # characters of a name that its temporary name repeats
_TEMPORARY = re.compile(r"\.(?P<name>.*)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)


def create(path: Path, mode: str = "xb") -> BinaryIO:
    """Primitive: open a file for writing, a new one ("xb") or at its end ("ab+")."""
    return path.open(mode)  # type: ignore[return-value]


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Primitive: all of `data` into an open file."""
    file.write(data)


def sync(descriptor: int) -> None:
    """Primitive: fsync."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Primitive: atomic replacement within one file system."""
    source.replace(target)


def remove(path: Path) -> None:
    """Primitive: delete a file, or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_folder(path: Path) -> None:
    """Primitive: make one folder, whose parent exists."""
    path.mkdir()


@contextmanager
def explained(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an OSError about `path` into a DiffkitError with exit code 4 (disk full, read-only, no permission, ...).

    need: bytes that were to be written, for the message of a full disk. Nothing but the write itself belongs inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise disk_full(path, need) from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DiffkitError(
            f"Cannot write {path}: {reason}.", "Choose another place with -o.", code=ExitCode.MACHINE
        ) from error


def disk_full(path: Path, need: int | None = None) -> DiffkitError:
    """The error for too little space at `path`; need: bytes."""
    have = f"have {bytes_text(free_space(path))} at {path}"
    needed = f"need {bytes_text(need)}, " if need is not None else ""
    return DiffkitError(
        f"Disk full: {needed}{have}.", "Make room, or choose another place with -o.", code=ExitCode.MACHINE
    )


def free_space(path: Path) -> int:
    """Bytes that may still be written at `path`, which need not exist yet."""
    return shutil.disk_usage(_existing(path)).free


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    absolute = Path(os.path.abspath(path))
    return next(each for each in (absolute, *absolute.parents) if os.path.lexists(each))


def sync_folder(folder: Path) -> None:
    """Make creations, renames and deletions inside `folder` survive a power cut (a no-op on Windows)."""
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


def sync_path(path: Path) -> None:
    """fsync a file by its name, if it exists: what was appended to it survives a power cut."""
    with explained(path), suppress(FileNotFoundError), path.open("rb") as file:
        sync(file.fileno())


def make_folders(path: Path) -> None:
    """Make a folder and those above it, each durably. One that exists is left as it is."""
    with explained(path):
        missing = list(takewhile(lambda each: not os.path.lexists(each), (path, *path.parents)))
        for folder in reversed(missing):
            try:
                make_folder(folder)
            except FileExistsError:
                if not os.path.isdir(folder):  # else another process was faster
                    raise
            sync_folder(folder.parent)


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Replace `path` by these bytes: afterwards either the old or the new content is there, whole."""
    temporary = temporary_name(path)
    with explained(path, sum(len(piece) for piece in pieces)):
        try:
            with create(temporary) as file:
                for piece in pieces:
                    write(file, piece)
                sync_file(file)
            rename(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_aside(path: Path, data: bytes) -> Path:
    """Write a file under a temporary name, which is returned; `publish` makes it durable and gives it its own."""
    temporary = temporary_name(path)
    with explained(path, len(data)):
        try:
            with create(temporary) as file:
                write(file, data)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return temporary


def publish(aside: Mapping[Path, Path]) -> None:
    """Give files that `write_aside` has written (values) their names (keys), each as `write_bytes` does.

    All are synced before any is renamed, and each folder once after that, which costs a fraction of what `write_bytes`
    takes for each. After an error some may have been renamed; none of the others is left behind.
    """
    from concurrent.futures import ThreadPoolExecutor

    try:
        if len(aside) > 1:
            _write_back(next(iter(aside)).parent)
        with ThreadPoolExecutor(_SYNCERS) as threads:  # who waits for the disk together waits once
            deque(threads.map(_sync_aside, aside.items()), maxlen=0)
        for path, temporary in aside.items():
            with explained(path):
                rename(temporary, path)
        for folder in dict.fromkeys(path.parent for path in aside):
            with explained(folder):
                sync_folder(folder)
    except BaseException:
        discard(aside.values())
        raise


def discard(aside: Iterable[Path]) -> None:
    """Remove what `write_aside` has written and is not to be published."""
    for temporary in aside:
        temporary.unlink(missing_ok=True)


def _sync_aside(names: tuple[Path, Path]) -> None:
    path, temporary = names
    with explained(path), temporary.open("r+b") as file:  # for Windows, which syncs no other
        sync(file.fileno())


def _write_back(folder: Path) -> None:
    """Have Linux write all that waits for this file system's disk, so that an fsync of each of many files is short.

    Best effort: older kernels do not report its errors, those fsyncs do.
    """
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                ctypes.CDLL(None).syncfs(descriptor)
            finally:
                os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


def json_line(value: Mapping[str, Any]) -> bytes:
    """A record of a JSON-lines file."""
    return (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file."""
    write_bytes(path, b"".join(map(json_line, records)))


def append_line(path: Path, value: dict[str, Any]) -> None:
    """`append_lines` of one."""
    append_lines(path, [value])


def append_lines(path: Path, values: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a JSON-lines file, in one write; `sync_path` makes them durable.

    A torn last line (power cut) is dropped by `read_lines`, never glued to the next.
    """
    line = b"".join(map(json_line, values))
    with explained(path, len(line)):
        new = not os.path.exists(path)
        with create(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            write(file, line)
        if new:
            sync_folder(path.parent)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file in turn; torn lines are passed over. A missing file has none.

    Lines end at "\n" only: other line separators may stand inside a text.
    """
    with suppress(FileNotFoundError, NotADirectoryError), path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All that `lines` has."""
    return list(lines(path))


def write_to(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write to an open file, with failures explained."""
    with explained(Path(file.name), len(data)):
        write(file, data)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process uses; it tells who writes there."""
    token = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name[:_LONGEST]}.{token}.tmp")


def is_temporary(name: str) -> bool:
    """Whether this is a name that `temporary_name` makes."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Remove everything half-written in a folder that the caller alone writes; other files stay."""
    for stray in _temporaries(folder):
        remove(folder / stray)


def _temporaries(folder: Path) -> list[str]:
    """Sorted names of half-written entries."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(name for name in os.listdir(folder) if is_temporary(name))
    return []


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
    """Whether something new may be put there: it does not exist, or is a folder without anything but half-written."""
    return not os.path.lexists(path) or (os.path.isdir(path) and all(map(is_temporary, os.listdir(path))))


def remove_stale(folder: Path, name: str) -> None:
    """Remove what writers of `name` in a folder left that were killed: those of this machine whose process is gone."""
    for stray in _temporaries(folder):
        match = _TEMPORARY.fullmatch(stray)
        assert match is not None
        if match["name"] == name[:_LONGEST] and match["host"] == _host() and not _alive(int(match["pid"])):
            remove(folder / stray)


def _host() -> str:
    """This machine in eight hexadecimal digits: process numbers mean something there only."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _alive(process: int) -> bool:
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Build a folder under a temporary name beside `path`; it appears there whole, or not at all.

    `path` is vacant (see `vacant`). Where it is the current folder or a mount point, which cannot be replaced, the
    entries are built inside and moved up, the last written one last. The caller fsyncs large files that it writes
    itself with `sync_file`; smaller ones go through `write_bytes`. Raises DiffkitError if another process has put
    something there meanwhile.
    """
    path = Path(os.path.abspath(path))
    inside = os.path.isdir(path) and (os.path.ismount(path) or path.samefile(os.curdir))
    temporary = temporary_name(path / path.name if inside else path)
    make_folders(temporary.parent)
    with explained(path):
        for folder in {path, path.parent}:
            remove_stale(folder, path.name)
        make_folder(temporary)
    try:
        yield temporary
        with explained(path):
            for inner, _, _ in os.walk(temporary):
                sync_folder(Path(inner))
            if inside:
                for entry in sorted(temporary.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
                    rename(entry, path / entry.name)
                remove(temporary)
            else:
                _replace_vacant(temporary, path)
            sync_folder(temporary.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_vacant(temporary: Path, path: Path) -> None:
    try:
        rename(temporary, path)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        raise DiffkitError(
            f"{path} has been written by another process meanwhile.",
            "It is left as it is; choose another place with -o.",
        ) from error
