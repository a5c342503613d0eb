"""Which files of a folder or an archive are images, which look like images, and which are something else."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from diffkit.datasets.imagefile import EXTENSIONS, printable

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

HEAD_BYTES = 16
NO_EXTENSION = "no extension"

_FOREIGN = re.compile(
    r"\.(heic|heif|hif|avif|jxl|jp2|j2k|jpx|jxr|wdp|apng|svg|psd|psb|xcf|kra|eps|ai|ico|icns|tga|pcx|dds|exr|hdr|qoi|bpg"
    r"|flif|p[pgbnf]m|dcm|raw|dng|cr[23w]|n[er][fw]|arw|sr[2fw]|orf|rw[2l]|raf|pef|x3f|erf|3fr|iiq|mos|kdc|dcr|mrw)"
)
_PLAIN = re.compile(
    r"\.(txt|caption|[ct]sv|jsonl?|ndjson|xml|html?|md|rst|pdf|docx?|xlsx?|toml|ya?ml|ini|cfg|log|db|py|ipynb|np[yz]|pt"
    r"|safetensors|parquet|arrow|zip|gz|tar|7z|rar|mp[34]|mov|avi|mkv|webm|m4v|wav|aae|xmp|thm|lnk|url)"
)
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_FOREIGN_MAGIC = (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1", b"ftypavif", b"ftypavis")
_MARKS = frozenset(["config.toml", "sessions.jsonl", "metrics.jsonl", "samples.jsonl"])
_OWN = {
    "run": "made by diffkit: a run",
    "samples": "made by diffkit: samples of a model; --source folder:generated=true includes them",
}
_SYSTEM = frozenset(["__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"])


class Entry(NamedTuple):
    """An image to be: its relative POSIX name, and the image (None = the file there)."""

    name: str
    image: ImageLike | None = None


class File(NamedTuple):
    """Any file: its relative POSIX name, the image that it would be, and a function that reads its first bytes."""

    name: str
    image: ImageLike | None = None
    head: Callable[[], bytes] = bytes


@dataclass
class Found:
    """What a folder or an archive holds.

    `skipped`: what looks like images and will not be read, as name and reason. `others`: all other files, by extension.
    `system`: hidden files and folders, and those of operating systems, by name.
    """

    entries: list[Entry] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    system: Counter[str] = field(default_factory=Counter)

    def skip(self, name: str, reason: str) -> None:
        """Pass over something that the user may take for an image."""
        self.skipped.append((printable(name), reason))

    def extensions(self) -> Counter[str]:
        """Everything that is not read, by extension."""
        return self.others + Counter(PurePosixPath(name).suffix.lower() or NO_EXTENSION for name, _ in self.skipped)


def sort_out(files: Sequence[File], found: Found, generated: bool) -> None:
    """Put each file where it belongs.

    Folders that diffkit made are passed over, unless they are around everything: runs always, samples unless
    `generated`. The sheet that `diffkit sample` lays beside its images is none of them.
    """
    own = _made_by_diffkit([file.name for file in files])
    sheets = {f"{folder}/grid.png".lstrip("/") for folder, kind in own.items() if kind == "samples"}
    passed = {folder for folder, kind in own.items() if folder and (kind == "run" or not generated)}
    if passed:
        around = os.path.commonpath([file.name for file in files])
        passed -= {around, *_above(around)}
    for folder in sorted(passed):
        found.skip(f"{folder}/", _OWN[own[folder]])
    for file in files:
        if file.name not in sheets and (not passed or passed.isdisjoint(_above(file.name))):
            _sort(file, found)


def _sort(file: File, found: Found) -> None:
    """By the extension and, where that says nothing, by the first bytes."""
    extension = PurePosixPath(file.name).suffix.lower()
    if extension in EXTENSIONS:
        found.entries.append(Entry(file.name, file.image))
    elif _FOREIGN.fullmatch(extension):
        found.skip(file.name, f"not a supported format: {printable(extension)}")
    elif _PLAIN.fullmatch(extension) or not (content := _content(file.head())):
        found.others[printable(extension) or NO_EXTENSION] += 1
    elif content == "foreign":
        found.skip(file.name, "not a supported format: HEIC or AVIF by its content")
    elif extension:
        reason = f"an image by its content, with the unknown extension {printable(extension)}: rename it"
        found.skip(file.name, reason)
    else:
        found.entries.append(Entry(file.name, file.image))


def hidden_part(name: str) -> str:
    """The first component of a relative POSIX name that is hidden or made by an operating system; empty if none is."""
    return next((part for part in name.split("/") if part.startswith(".") or part.lower() in _SYSTEM), "")


def _made_by_diffkit(names: Sequence[str]) -> dict[str, str]:
    """The outermost folders that diffkit made, as "run" or "samples"; "" is the root."""
    files = defaultdict[str, set[str]](set)
    for name in names:
        folder, _, base = name.rpartition("/")
        if base in _MARKS:
            files[folder].add(base)
    own: dict[str, str] = {}
    for folder in sorted(files):
        kind = "run" if len(files[folder] - {"samples.jsonl"}) > 1 else "samples"
        marked = (kind == "run" and "config.toml" in files[folder]) or "samples.jsonl" in files[folder]
        if marked and own.keys().isdisjoint(above for above in _above(folder) if above):
            own[folder] = kind
    return own


def _above(name: str) -> Iterator[str]:
    """The folders that a name lies in, from the innermost to "", the root."""
    while name:
        name = name.rpartition("/")[0]
        yield name


def _content(head: bytes) -> str:
    """ "image", "foreign" (an image in a format that diffkit does not read) or an empty string."""
    bitmap = head.startswith(b"BM") and head[6:10] == bytes(4)
    if bitmap or head.startswith(_MAGIC) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return "image"
    return "foreign" if head[4:].startswith(_FOREIGN_MAGIC) else ""
