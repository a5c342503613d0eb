"""Pairs of images for image-to-image training: inputs in a folder of their own, by the same names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike


def paired(examples: Iterable[Example], inputs: Iterable[Example]) -> Iterator[Example]:
    """Each example with the input of the same relative name, whatever the file's type.

    Examples without one come without it. Raises DiffkitError at the end if none has one.
    """
    found: dict[str, ImageLike] = {}
    for each in inputs:
        name = _stem(each)
        if name in found:
            raise DiffkitError(f"Two input images are called '{name}'.", "Rename one.", code=ExitCode.DATA)
        found[name] = each.image
    matched, first = 0, ""
    for example in examples:
        name = _stem(example)
        first = first or name
        matched += name in found
        yield replace(example, input=found.get(name))
    if not matched and first:
        raise DiffkitError(
            f"No image has a pair: the inputs have '{next(iter(found), '')}', the images are like '{first}'.",
            "An image and its input lie in two folders under the same name.",
            code=ExitCode.DATA,
        )


def _stem(example: Example) -> str:
    path = PurePosixPath(example.id or (example.image.name if isinstance(example.image, Path) else ""))
    return str(path.with_suffix("")) if path.name else ""
