"""Which row of a table names which image: by the relative path, and by less only where that is not ambiguous."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from diffkit.datasets.imagefile import EXTENSIONS
from diffkit.datasets.names import key, unescaped


@dataclass
class Matches:
    """The image of each row that has one; how many were found in a looser way than by their path, by way."""

    image_of: dict[int, int] = field(default_factory=dict)
    loosely: Counter[str] = field(default_factory=Counter)


class AmbiguousNameError(Exception):
    """A row that may name any of several images."""

    def __init__(self, row: int, images: list[str]) -> None:
        super().__init__(row, images)
        self.row, self.images = row, images


class Images:
    """The names of the images, as keys. `root` is the name of the folder or archive that they lie in."""

    def __init__(self, identities: Sequence[str], root: str = "") -> None:
        self.identities = identities
        self.raw = [unescaped(name) for name in identities]
        self.keys = [key(name) for name in self.raw]
        self.by_key = _index(self.keys)
        self.root = key(root)
        self.outer = _common(self.keys)
        self._known: dict[bool, tuple[set[str], set[str]]] = {}
        self.root_inside = any(self.root in name.split("/")[:-1] for name in self.keys)

    def known(self, bases: bool) -> tuple[set[str], set[str]]:
        """All keys, with base names if `bases`, and all forms of them."""
        if bases not in self._known:
            exact = set(self.by_key) | ({_base(name) for name in self.keys} if bases else set())
            self._known[bases] = exact, {form(name) for name in exact for form in _FORMS.values()}
        return self._known[bases]

    def path(self, name: str) -> str:
        """A row's key as seen from the root: a row may begin above the root, or inside the folder around everything."""
        if name in self.by_key or not name:
            return name
        parts = name.split("/")
        above = [at for at, part in enumerate(parts[:-1], 1) if part == self.root]
        for at in above:
            if "/".join(parts[at:]) in self.by_key:
                return "/".join(parts[at:])
        if self.outer + name in self.by_key:
            return self.outer + name
        return "/".join(parts[above[-1] :]) if above and not self.root_inside else name


# In this order; each is tried on the rows and the images that no earlier one has joined.
_FORMS: dict[str, Callable[[str], str]] = {
    "": lambda name: name,
    "in another case": str.casefold,
    "without the extension": lambda name: _stem(name),
    "without the extension and in another case": lambda name: _stem(name).casefold(),
}


def match(cells: Sequence[str], images: Images) -> Matches:
    """Join rows, given by the cells of their name column, to images.

    A base name counts only where no row has a folder in its name. Raises AmbiguousNameError.
    """
    given = [key(cell) for cell in cells]
    keys = [images.path(name) for name in given]
    places: dict[str, Callable[[str], str]] = (
        {"": str} if any("/" in name for name in given) else {"": str, "by base name": _base}
    )
    found = Matches()
    for form, change in _FORMS.items():
        for place, part in places.items():
            if all(row in found.image_of or not name for row, name in enumerate(keys)):
                return found
            index = _index([change(part(name)) for name in images.keys])
            options = {row: index.get(change(name), []) for row, name in enumerate(keys) if name}
            chosen = _chosen(cells, options, images, found, exact=not place and not form)
            _check_twins(chosen, images)
            found.image_of |= chosen
            way = " ".join(filter(None, [place, form]))
            if way and chosen:
                found.loosely[way] += len(chosen)
    return found


def count_matches(cells: Sequence[str], images: Images) -> tuple[int, int]:
    """How many rows name an image, exactly (by path or base name), and in any way at all."""
    given = [key(cell) for cell in cells]
    keys = [images.path(name) for name in given]
    exact, loose = images.known(bases=not any("/" in name for name in given))
    others = [name for name in keys if name and name not in exact]
    count = sum(name in exact for name in keys)
    return count, count + sum(any(form(name) in loose for form in _FORMS.values()) for name in others)


def _chosen(
    cells: Sequence[str], options: dict[int, list[int]], images: Images, found: Matches, *, exact: bool
) -> dict[int, int]:
    """The image of each row that has none yet, among those that it may name in one way."""
    chosen: dict[int, int] = {}
    taken = set(found.image_of.values())
    for row, those in options.items():
        if row in found.image_of or taken.issuperset(those):
            continue
        if len(those) > 1:
            # Two files may differ in the spelling alone (accents, blanks); then only the very same characters decide.
            same = [image for image in those if images.raw[image] == cells[row].strip()]
            if not exact or len(same) != 1:
                raise AmbiguousNameError(row, [images.identities[image] for image in those])
            those = same
        chosen[row] = those[0]
    return chosen


def _check_twins(chosen: dict[int, int], images: Images) -> None:
    """Of images whose names differ in the spelling alone, either each has a row of its own or none has one."""
    taken = set(chosen.values())
    for row, image in chosen.items():
        twins = images.by_key[images.keys[image]]
        if len(twins) > 1 and not taken.issuperset(twins):
            raise AmbiguousNameError(row, [images.identities[twin] for twin in twins])


def _index(names: Sequence[str]) -> dict[str, list[int]]:
    index = defaultdict[str, list[int]](list)
    for number, name in enumerate(names):
        index[name].append(number)
    return dict(index)


def _common(keys: Sequence[str]) -> str:
    """The folders around all of these names, with a slash; empty if there are none."""
    if not keys:
        return ""
    low, high = (name.split("/")[:-1] for name in (min(keys), max(keys)))
    common = []
    for one, other in zip(low, high, strict=False):
        if one != other:
            break
        common.append(one)
    # Names sort by characters, folders by components: what holds for the extremes must hold for all.
    prefix = "".join(f"{part}/" for part in common)
    return prefix if all(name.startswith(prefix) for name in keys) else ""


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _stem(name: str) -> str:
    """Without the extension, where it is one of an image."""
    stem, dot, extension = name.rpartition(".")
    return stem if dot and f".{extension.lower()}" in EXTENSIONS else name
