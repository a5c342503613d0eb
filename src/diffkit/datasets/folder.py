"""Dataset source: a folder of images, or a zip archive of one."""

from __future__ import annotations

import os
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from diffkit import paths
from diffkit.datasets.archive import members
from diffkit.datasets.imagefile import EXTENSIONS, Refused, is_image_name, printable
from diffkit.datasets.layout import Layout, understand
from diffkit.datasets.sorting import HEAD_BYTES, Entry, File, Found, hidden_part, sort_out
from diffkit.errors import DiffkitError, ExitCode, did_you_mean, nearest_sibling
from diffkit.interfaces import Account, Example, Listing

LABELS = ("folders", "path", "none")


def folder(
    path: str, *, labels: str = "folders", splits: bool = True, generated: bool = False, follow_links: bool = False
) -> Iterator[Example]:
    """Images below a folder or inside a .zip file, sorted by the bytes of their relative names.

    labels: "folders" = the outermost sub-folder is the class, "path" = all sub-folders together are, "none". Folders
    around everything do not count. Images beside the class folders carry no label; fewer than two classes mean no
    labels at all. splits: folders called train, val, test and the like are a split of the data, not classes.
    generated: include what `diffkit sample` made. Hidden files are skipped. Links that lead outside the folder are
    rejected unless `follow_links`; loops are cut. Files without an extension that are images are read; the account
    lists what else looks like an image, and sub-folders that cannot be read. Raises DiffkitError when there is
    nothing to read.
    """
    if labels not in LABELS:
        raise DiffkitError(
            f"labels cannot be '{labels}'.",
            f"{did_you_mean(labels, LABELS)}Choose one of {', '.join(LABELS)}.",
        )
    root = Path(path)
    try:
        found = _look(root, follow_links, generated)
    except OSError as error:
        where = printable(str(error.filename or path))
        raise DiffkitError(
            f"Cannot read {where}: {error.strerror}.", "Check its permissions.", code=ExitCode.DATA
        ) from error
    if not found.entries:
        raise _no_images(root, found)
    found.entries.sort(key=lambda entry: os.fsencode(entry.name))
    return _listing(root, found, labels, splits)


def _look(root: Path, follow_links: bool, generated: bool) -> Found:
    """Everything in the folder or archive; of images, nothing is opened yet."""
    if paths.is_folder(root):
        return _Walk(root, follow_links).run(generated)
    if paths.is_file(root) and (root.suffix.lower() == ".zip" or zipfile.is_zipfile(root)):
        return members(root, generated)
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
    for name, reason in found.skipped:
        if name.endswith("/"):
            return DiffkitError(f"No image in {root}; {name}: {reason}.", readable, code=ExitCode.DATA)
    if not found.extensions():
        if found.system:
            hidden = f"hidden files and folders, or the system's: {_counted(found.system)}"
            return DiffkitError(f"{root} is empty but for {hidden}.", readable, code=ExitCode.DATA)
        return DiffkitError(f"{root} is empty.", readable, code=ExitCode.DATA)
    return DiffkitError(f"No image in {root}; it holds {_counted(found.extensions())}.", readable, code=ExitCode.DATA)


def _listing(root: Path, found: Found, labels: str, splits: bool) -> Listing:
    """One Example per image, with what the folders mean and an account of everything else."""
    # What is refused by its name alone is not an image, and does not decide what the folders mean.
    usable = [entry for entry in found.entries if not isinstance(entry.image, Refused)]
    folders = [tuple(map(_class_name, entry.name.split("/")[:-1])) for entry in usable]
    layout = understand(folders, labels, splits)
    known = {entry.name: (label, part) for entry, label, part in zip(usable, layout.labels, layout.parts, strict=True)}

    def examples() -> Iterator[Example]:
        for entry in found.entries:
            label, part = known.get(entry.name, (None, None))
            image = entry.image if entry.image is not None else root / entry.name
            yield Example(image, label, printable(entry.name), part=part)

    return Listing(examples(), _account(found, layout))


def _class_name(folder: str) -> str:
    """Accents composed, for macOS writes them decomposed: the same name is the same class."""
    return printable(unicodedata.normalize("NFC", folder))


def _account(found: Found, layout: Layout) -> Account:
    remarks = list(layout.remarks)
    if found.others:
        remarks.append(f"Other files, left alone: {_counted(found.others)}.")
    if found.system:
        remarks.append(f"Hidden files and folders, or the system's, not looked into: {_counted(found.system)}.")
    record: dict[str, Any] = {"layout": layout.remarks, "other_files": dict(sorted(found.others.items()))}
    return Account(remarks, skipped=sorted(found.skipped), record=record)


def _counted(counts: Counter[str]) -> str:
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(most) - 5} more kinds" if len(most) > 5 else ""
    return ", ".join(f"{printable(name)} ({count})" for name, count in most[:5]) + more


class _Walk:
    """A folder tree, real folders first, so that a link to one of them never renames its images."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = root
        self.boundary = root.resolve()
        self.follow_links = follow_links
        self.seen: set[tuple[int, int]] = set()
        self.links: list[str] = []
        self.files: list[File] = []
        self.found = Found()

    def run(self, generated: bool) -> Found:
        """Visit everything once. Raises OSError only where the root itself cannot be read."""
        self._descend("")
        while self.links:
            batch, self.links = sorted(self.links, key=os.fsencode), []
            for name in batch:
                self._link(name)
        sort_out(self.files, self.found, generated)
        return self.found

    def _descend(self, top: str) -> None:
        """The folder `top` and all real folders below it; links are put aside."""
        pending = [top]
        while pending:
            base = pending.pop()
            try:
                entries = self._entries(base)
            except OSError as error:
                if not base:
                    raise
                self.found.skip(f"{base}/", f"folder cannot be read: {error.strerror}")
                continue
            for entry in entries:
                name = f"{base}/{entry.name}" if base else entry.name
                if hidden := hidden_part(entry.name):
                    self.found.system[hidden] += 1
                elif entry.is_symlink():
                    self.links.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                else:
                    self._add(name)

    def _entries(self, base: str) -> list[os.DirEntry[str]]:
        """What a folder holds; nothing at its second visit."""
        status = (self.root / base).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in self.seen:
            return []
        self.seen.add(identity)
        with os.scandir(self.root / base) as scanned:
            return sorted(scanned, key=lambda entry: os.fsencode(entry.name))

    def _add(self, name: str, image: Refused | None = None) -> None:
        self.files.append(File(name, image, partial(_head, self.root / name)))

    def _link(self, name: str) -> None:
        """A link to a file or a folder: used, refused or, where it closes a loop, passed over."""
        try:
            real = (self.root / name).resolve(strict=True)
        except PermissionError:
            self.found.skip(name, "a link that cannot be followed: Permission denied")
            return
        except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
            self._add(name, Refused("a broken link"))
            return
        if not self.follow_links and not real.is_relative_to(self.boundary):
            if real.is_dir() or is_image_name(name):
                self._refuse_outside(name)
        elif real.is_dir():
            self._descend(name)
        else:
            self._add(name)

    def _refuse_outside(self, name: str) -> None:
        # Also for folders, whatever their name looks like: the user must hear of it.
        reason = "a link that leads outside the folder: --source folder:follow_links=true includes it"
        self.found.entries.append(Entry(name, Refused(reason)))


def _head(path: Path) -> bytes:
    """The first bytes of a regular file; none where it cannot be read. Anything else might block."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""
