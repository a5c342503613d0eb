"""Pairs of images for image-to-image training: inputs in a folder of their own, by the same names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from diffkit.datasets.names import key, unescaped
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Account, Example, Listing, account_of


def paired(examples: Iterable[Example], inputs: Iterable[Example]) -> Listing:
    """Each example with the input of the same relative name, whatever the file's type.

    Examples without one come without it; the account names inputs that belong to no image. Raises DiffkitError where
    two inputs or two images have the same name, and at the end if no image has an input.
    """
    account, beside = account_of(examples), account_of(inputs)
    account = Account(account.remarks, account.problems, account.skipped + beside.skipped, account.record)
    return Listing(_paired(examples, inputs, account), account)


def _paired(examples: Iterable[Example], inputs: Iterable[Example], account: Account) -> Iterator[Example]:
    found: dict[str, Example] = {}
    for each in inputs:
        name = _stem(each)
        if name in found:
            raise _twice("input images", name, found[name], each)
        found[name] = each
    users = defaultdict[str, list[Example]](list)
    first = ""
    for example in examples:
        name = _stem(example)
        first = first or name
        if name in found:
            if users[name]:
                raise _twice("images that have an input", name, users[name][0], example)
            users[name].append(example)
        yield replace(example, input=found[name].image if name in found else None)
    if not users and first:
        raise DiffkitError(
            f"No image has a pair: the inputs have '{next(iter(found), '')}', the images are like '{first}'.",
            "An image and its input lie in two folders under the same name.",
            code=ExitCode.DATA,
        )
    if unused := [_name(each) for name, each in found.items() if name not in users]:
        account.problems["input without an image"] = unused


def _twice(what: str, name: str, one: Example, other: Example) -> DiffkitError:
    return DiffkitError(
        f"Two {what} are called '{name}': {_name(one)} and {_name(other)}.",
        "Rename or remove one; extensions, accents and blanks do not tell them apart.",
        code=ExitCode.DATA,
    )


def _name(example: Example) -> str:
    return example.id or (example.image.name if isinstance(example.image, Path) else "")


def _stem(example: Example) -> str:
    path = PurePosixPath(key(unescaped(_name(example))))
    return str(path.with_suffix("")) if path.name else ""
