"""What a power cut may leave on the disk, from a record of what was done to it.

The model is that of ALICE (Pillai et al. 2014) with no favours from the file system: content is safe once its file has
been synced; a name that was created, renamed or removed is safe once its folder has been synced; of everything else,
any part may be there, in any order.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

from diffkit.selftest.actions import ACTIONS
from diffkit.selftest.lab import Lab
from diffkit.selftest.operations import Operation, replace_operations

Content: TypeAlias = Literal["whole", "lost", "torn", "zeros"]
Layout: TypeAlias = dict[str, "tuple[tuple[int, Content], ...] | None"]
"""By relative path: the writes that make up a file, by the number of their step; None is a folder."""

CONTENTS: tuple[Content, ...] = ("whole", "lost", "torn", "zeros")


@dataclass(frozen=True)
class Step:
    """One thing done to the disk. A node is a file or a folder, whatever it is called; 0 is the folder watched."""

    kind: Literal["create", "folder", "write", "sync", "rename", "remove", "begin"]
    node: int = 0
    place: tuple[int, str] = (0, "")  # folder and name
    source: tuple[int, str] = (0, "")
    offset: int = 0
    data: bytes = b""


class Record:
    """Put in place in a process, it notes in `file` all that is done under `folder`. (Linux only: it needs /proc.)

    Nodes are identified by inode; every one is kept open, so that its number is not used again.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder, self.file = folder.resolve(), file
        self.nodes: dict[tuple[int, int], int] = {}

    def __call__(self) -> None:
        self.lock = threading.RLock()
        self.log = self.file.open("ab", buffering=0)
        root = self.folder.stat()
        self.nodes[root.st_dev, root.st_ino] = 0
        for path in sorted(self.folder.rglob("*")):
            node = self._node(path)
            if node is not None and path.is_file():
                self._note(Step("write", node, data=path.read_bytes()))
        self._note(Step("begin"))
        replace_operations(self._around)

    def _around(self, name: str, operation: Operation, arguments: tuple[Any, ...]) -> Any:
        with self.lock:
            steps = self._steps(name, *arguments)
        result = operation(*arguments)
        with self.lock:
            if name in ("create", "make_folder"):
                self._node(Path(arguments[0]))
            for step in steps:
                self._note(step)
        return result

    def _steps(self, name: str, subject: Any, other: Any = None) -> list[Step]:
        """What an operation is about to do."""
        if name == "write":
            node, size = self._opened(subject.fileno()), os.fstat(subject.fileno()).st_size
            offset = size if "a" in str(getattr(subject, "mode", "")) else subject.tell()
            return [] if node is None else [Step("write", node, offset=offset, data=bytes(other))]
        if name == "sync":
            node = self._opened(subject)
            return [] if node is None else [Step("sync", node)]
        if name == "rename":
            node, source, place = self._node(subject), self._place(subject), self._place(other)
            return [] if node is None or place is None or source is None else [Step("rename", node, place, source)]
        if name == "remove" and os.path.lexists(subject):
            inside = sorted(subject.rglob("*"), reverse=True) if subject.is_dir() else []
            found = [(self._node(path), self._place(path)) for path in [*inside, subject]]
            return [Step("remove", node, place) for node, place in found if node is not None and place is not None]
        return []

    def _opened(self, descriptor: int) -> int | None:
        """The node behind a descriptor."""
        return self._node(Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor))

    def _place(self, path: Path) -> tuple[int, str] | None:
        parent = self._node(path.absolute().parent)
        return None if parent is None else (parent, path.name)

    def _node(self, path: Path, status: os.stat_result | None = None) -> int | None:
        """The node at a path, noted as created if it has not been seen before; None outside of the folder."""
        path = path.absolute()
        if path != self.folder and self.folder not in path.parents:
            return None
        status = status or path.stat()
        key = (status.st_dev, status.st_ino)
        if key not in self.nodes:
            place = self._place(path)
            assert place is not None
            self.nodes[key] = len(self.nodes)
            os.open(path, os.O_RDONLY)
            kind: Literal["create", "folder"] = "folder" if stat.S_ISDIR(status.st_mode) else "create"
            self._note(Step(kind, self.nodes[key], place))
        return self.nodes[key]

    def _note(self, step: Step) -> None:
        self.log.write(pickle.dumps(step))


@dataclass(frozen=True)
class Log:
    """The steps of a record, in order. `safe`: for each, the number of the sync that made it so, if one did."""

    steps: tuple[Step, ...]
    safe: tuple[int, ...]

    def pending(self, cut: int) -> list[int]:
        """Names created, renamed or removed before `cut` that are not safe there."""
        named = ("create", "folder", "rename", "remove")
        return [n for n in range(cut) if self.steps[n].kind in named and self.safe[n] >= cut]

    def layout(self, cut: int, kept: frozenset[int], content: Content) -> Layout:
        """The folder after a power cut before step `cut`, with the `kept` ones of the pending names."""
        folders: dict[int, dict[str, int]] = {0: {}}
        files: dict[int, list[tuple[int, Content]]] = {}
        for number, step in enumerate(self.steps[:cut]):
            folder, name = step.place
            if step.kind == "folder":
                folders.setdefault(step.node, {})
            elif step.kind == "create":
                files.setdefault(step.node, [])
            if step.kind == "write":
                files[step.node].append((number, "whole" if self.safe[number] < cut else content))
            elif self.safe[number] >= cut and number not in kept:
                continue
            elif step.kind in ("create", "folder", "rename"):
                if step.kind == "rename" and folders[step.source[0]].get(step.source[1]) == step.node:
                    del folders[step.source[0]][step.source[1]]
                folders[folder][name] = step.node
            elif step.kind == "remove" and folders[folder].get(name) == step.node:
                del folders[folder][name]
        return dict(_walk(0, "", folders, files))

    def render(self, layout: Layout, folder: Path) -> None:
        """Write a layout into an empty folder."""
        for name, pieces in sorted(layout.items()):
            if pieces is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(self._bytes(pieces))

    def _bytes(self, pieces: tuple[tuple[int, Content], ...]) -> bytes:
        data = bytearray()
        for place, (number, content) in enumerate(pieces):
            step = self.steps[number]
            piece = step.data if content in ("whole", "torn") else bytes(len(step.data) if content == "zeros" else 0)
            if content == "torn" and place == len(pieces) - 1:
                piece = piece[: len(piece) // 2]
            if piece:
                data.extend(bytes(max(0, step.offset - len(data))))
                data[step.offset : step.offset + len(piece)] = piece
        return bytes(data)


@dataclass(frozen=True)
class State:
    """A power cut before step `cut` of a log, and which of the pending names and contents got through."""

    log: Path
    cut: int
    kept: frozenset[int]
    content: Content

    @property
    def what(self) -> str:
        log = read_log(self.log)
        lost = [log.steps[n] for n in log.pending(self.cut) if n not in self.kept]
        names = ", ".join(f"{step.kind} {step.place[1]}" for step in lost)
        return f"cut before step {self.cut}, pending content {self.content}, lost: {names or 'no name'}"

    def materialise(self, folder: Path) -> None:
        """Write it into an empty folder."""
        log = read_log(self.log)
        log.render(log.layout(self.cut, self.kept, self.content), folder)

    def durable_images(self) -> int:
        """The images seen by the newest checkpoint that has to be there, whatever got through."""
        sure = read_log(self.log).layout(self.cut, frozenset(), "lost")
        return max(
            (int(found[1]) for name in sure if (found := re.search(r"checkpoints/images-(\d+)/", name))), default=0
        )


def record(lab: Lab, name: str) -> Path:
    """Run an action and keep the log of it."""
    room, file = ACTIONS[name].begin(lab), lab.folder / f"{name}.log"
    if not file.exists():
        lab.diffkit(*ACTIONS[name].words(lab), here=room, setup=[Record(room, file)])
    shutil.rmtree(room)
    return file


@lru_cache(maxsize=8)
def read_log(file: Path) -> Log:
    """The steps, writes that follow each other put together."""
    steps: list[Step] = []
    with file.open("rb") as log:
        while True:
            try:
                step: Step = pickle.load(log)
            except EOFError:
                break
            last = steps[-1] if steps else step
            joined = step.kind == last.kind == "write" and step.node == last.node
            if joined and step is not last and step.offset == last.offset + len(last.data):
                steps[-1] = replace(last, data=last.data + step.data)
            else:
                steps.append(step)
    begin = next(number for number, step in enumerate(steps) if step.kind == "begin")
    return Log(tuple(steps), tuple(_safe(steps, number, begin) for number in range(len(steps))))


def states(lab: Lab, name: str) -> list[State]:
    """All different states that power cuts during an action may leave: pending names all there, none, each alone, all
    but each; pending contents whole, lost, torn, zeroed."""
    file = record(lab, name)
    log, seen, found = read_log(file), set[int](), list[State]()
    begin = next(number for number, step in enumerate(log.steps) if step.kind == "begin")
    for cut in range(begin + 1, len(log.steps) + 1):
        pending = frozenset(log.pending(cut))
        alone = [frozenset([number]) for number in pending]
        for kept in dict.fromkeys([pending, frozenset[int](), *alone, *(pending - one for one in alone)]):
            for content in CONTENTS if kept in (pending, frozenset()) else CONTENTS[:2]:
                layout = hash(frozenset(log.layout(cut, kept, content).items()))
                if layout not in seen:
                    seen.add(layout)
                    found.append(State(file, cut, kept, content))
    return found


def _safe(steps: list[Step], number: int, begin: int) -> int:
    """The sync that makes a step safe; what was there at the beginning is."""
    if number < begin:
        return 0
    step = steps[number]
    needed = step.node if step.kind == "write" else step.place[0]
    later = range(number + 1, len(steps))
    return next((n for n in later if steps[n].kind == "sync" and steps[n].node == needed), sys.maxsize)


def _walk(
    node: int, path: str, folders: dict[int, dict[str, int]], files: dict[int, list[tuple[int, Content]]]
) -> Iterator[tuple[str, tuple[tuple[int, Content], ...] | None]]:
    for name, inner in folders[node].items():
        where = f"{path}{name}"
        if inner in folders:
            yield where, None
            yield from _walk(inner, where + "/", folders, files)
        else:
            yield where, tuple(piece for piece in files.get(inner, []) if piece[1] != "lost")
