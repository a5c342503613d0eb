"""Dataset source: a folder of images, or a zip archive of one."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from diffkit import paths
from diffkit.datasets.archive import Entry, Found, is_hidden, members
from diffkit.datasets.imagefile import EXTENSIONS, Refused, is_image_name, printable
from diffkit.errors import DiffkitError, ExitCode, did_you_mean, nearest_sibling
from diffkit.interfaces import Example

LABELS = ("folders", "path", "none")


def folder(path: str, *, labels: str = "folders", follow_links: bool = False) -> Iterator[Example]:
    """Images below a folder or inside a .zip file, sorted by the bytes of their relative names.

    labels: "folders" = the top-level sub-folder is the class, "path" = the whole relative folder is, "none".
    Images beside the class folders carry no label; fewer than two classes mean no labels at all. In a zip, a
    single folder around everything is not a class. Hidden files are skipped. Links that lead outside the
    folder are rejected unless `follow_links`; loops are cut. Raises DiffkitError when there is nothing to
    read.
    """
    if labels not in LABELS:
        raise DiffkitError(
            f"labels cannot be '{labels}'.",
            f"{did_you_mean(labels, LABELS)}Choose one of {', '.join(LABELS)}.",
        )
    root = Path(path)
    try:
        found = _look(root, follow_links)
    except OSError as error:
        where = printable(str(error.filename or path))
        raise DiffkitError(
            f"Cannot read {where}: {error.strerror}.", "Check its permissions.", code=ExitCode.DATA
        ) from error
    if not found.entries:
        raise _no_images(root, found)
    found.entries.sort(key=lambda entry: os.fsencode(entry.name))
    return _examples(root, found, labels)


def _look(root: Path, follow_links: bool) -> Found:
    """Everything in the folder or archive; nothing is opened yet."""
    if paths.is_folder(root):
        return _Walk(root, follow_links).run()
    if paths.is_file(root) and (root.suffix.lower() == ".zip" or zipfile.is_zipfile(root)):
        return members(root)
    if paths.exists(root):
        raise DiffkitError(
            f"{root} is neither a folder nor a zip archive.",
            "Give the folder that holds the images.",
            code=ExitCode.DATA,
        )
    raise DiffkitError(
        f"There is no {root}.",
        f"{nearest_sibling(root)}Give a folder of images or a zip archive.",
        code=ExitCode.DATA,
    )


def _no_images(root: Path, found: Found) -> DiffkitError:
    """Empty, or full of other things: say which."""
    readable = "diffkit reads " + " ".join(sorted(EXTENSIONS)) + "."
    if not found.others:
        return DiffkitError(f"{root} is empty.", readable, code=ExitCode.DATA)
    seen = ", ".join(f"{printable(suffix)} ({count})" for suffix, count in found.others.most_common(5))
    return DiffkitError(f"No image in {root}; it holds {seen}.", readable, code=ExitCode.DATA)


def _examples(root: Path, found: Found, labels: str) -> Iterator[Example]:
    """One Example per entry. Fewer than two distinct labels tell nothing apart, so they become None."""
    names = [_label(entry.name[len(found.wrapper) :], labels) for entry in found.entries]
    conditional = len(set(names) - {None}) > 1
    for entry, label in zip(found.entries, names, strict=True):
        image = entry.image if entry.image is not None else root / entry.name
        yield Example(image, label if conditional else None, printable(entry.name))


def _label(name: str, labels: str) -> str | None:
    """The class of a relative POSIX name; None directly in the root."""
    folders = name.split("/")[:-1]
    if labels == "none" or not folders:
        return None
    return printable(folders[0] if labels == "folders" else "/".join(folders))


class _Walk:
    """A folder tree, real folders first, so that a link to one of them never renames its images."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = root
        self.boundary = root.resolve()
        self.follow_links = follow_links
        self.seen: set[tuple[int, int]] = set()
        self.links: list[str] = []
        self.found = Found()

    def run(self) -> Found:
        """Visit everything once."""
        self._descend("")
        while self.links:
            batch, self.links = sorted(self.links, key=os.fsencode), []
            for name in batch:
                self._link(name)
        return self.found

    def _descend(self, top: str) -> None:
        """The folder `top` and all real folders below it; links are put aside."""
        pending = [top]
        while pending:
            base = pending.pop()
            status = (self.root / base).stat()
            identity = (status.st_dev, status.st_ino)
            if identity in self.seen:
                continue
            self.seen.add(identity)
            with os.scandir(self.root / base) as scanned:
                entries = sorted(scanned, key=lambda entry: os.fsencode(entry.name))
                made_here = any(entry.name == "samples.jsonl" for entry in entries)
                for entry in entries:
                    # The sheet that `diffkit sample` lays beside its images is none of them.
                    if is_hidden(entry.name) or (made_here and entry.name == "grid.png"):
                        continue
                    name = f"{base}/{entry.name}" if base else entry.name
                    if entry.is_symlink():
                        self.links.append(name)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(name)
                    else:
                        self.found.add(name)

    def _link(self, name: str) -> None:
        """A link to a file or a folder: used, refused or, where it closes a loop, passed over."""
        try:
            real = (self.root / name).resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
            self.found.add(name, Refused("a broken link"))
            return
        if not self.follow_links and not real.is_relative_to(self.boundary):
            if real.is_dir() or is_image_name(name):
                self._refuse_outside(name)
        elif real.is_dir():
            self._descend(name)
        else:
            self.found.add(name)

    def _refuse_outside(self, name: str) -> None:
        # Also for folders, whatever their name looks like: the user must hear of it.
        reason = "a link that leads outside the folder: --source folder:follow_links=true includes it"
        self.found.entries.append(Entry(name, Refused(reason)))
