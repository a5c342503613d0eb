"""Names and values on their way elsewhere: a label to a file name, a path to a shell, a value to a message."""

from __future__ import annotations

import hashlib
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LONGEST = 200
"""Bytes of a file name that is made of a label: most file systems take 255, those that encrypt names fewer."""
_FORBIDDEN = frozenset('/\\:*?"<>|')
_RESERVED = frozenset(
    {"CON", "PRN", "AUX", "NUL", *(f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10))}
)


def command(*words: str | Path) -> str:
    """A diffkit command that can be pasted into a shell; a Path is never taken for an option there."""
    return " ".join(["diffkit", *(_quoted(argument(word)) for word in words)])


def argument(word: str | Path) -> str:
    """A word of a command; a path that begins with a dash as ./-name."""
    text = str(word)
    return f"./{text}" if isinstance(word, Path) and text.startswith("-") else text


def shown(value: Any) -> str:
    """A value in a message: not longer than a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text):,} characters)"


def bytes_text(count: float) -> str:
    """A number of bytes for people: "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def file_names(labels: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """A file or folder name for each label, all different, even if case and accents are ignored.

    A label that can be a name is kept, another is changed as little as possible. taken: names that are not free.
    """
    different = dict.fromkeys(labels)
    used = {_folded(name) for name in taken}
    found: dict[str, str] = {}
    for label in sorted(different, key=lambda each: _safe(each) != each):
        name, number = _safe(label), 1
        while _folded(name) in used:
            number += 1
            name = f"{_safe(label)}-{number}"
        used.add(_folded(name))
        found[label] = name
    return {label: found[label] for label in different}


def _safe(label: str) -> str:
    name = "".join(c if c.isprintable() and c not in _FORBIDDEN else "_" for c in label).strip(". ")
    if not name or name[0] == "-" or name.split(".")[0].rstrip().upper() in _RESERVED or name == "__MACOSX":
        name = f"_{name}"
    if len(name.encode()) > LONGEST:
        digest = hashlib.sha256(label.encode(errors="surrogatepass")).hexdigest()[:8]
        name = name.encode()[: LONGEST - 9].decode(errors="ignore").rstrip(". ") + "-" + digest
    return name


def _folded(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _quoted(word: str) -> str:
    """The word for a POSIX shell; what cannot be seen is written as an escape, $'...'."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
