"""Names of files as keys: the same for all spellings that a person would call the same name."""

from __future__ import annotations

import re
import unicodedata

_BLANKS = str.maketrans("\t\n\v\f\r", "     ")
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|([nrt\\]))")
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def key(name: str) -> str:
    """A relative POSIX path in one spelling.

    Accents are composed (NFC), every Unicode blank is a space, invisible format characters are dropped, backslashes
    are slashes; blanks around the name, "./" and empty components go.
    """
    if not name.isascii():
        composed = unicodedata.normalize("NFC", name)
        name = "".join(" " if c.isspace() else c for c in composed if unicodedata.category(c) != "Cf")
    parts = name.translate(_BLANKS).strip().replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def unescaped(identity: str) -> str:
    """The file name that `printable` made an id of."""
    return _ESCAPE.sub(_character, identity)


def _character(match: re.Match[str]) -> str:
    letter = match[4]
    return _LETTERS[letter] if letter else chr(int(match[1] or match[2] or match[3], 16))
