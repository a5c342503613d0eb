"""What the folders around images mean: a wrapper, a split into training and hold-out, or classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TRAIN = frozenset(["train", "training"])
HOLDOUT = frozenset(["val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation", "holdout"])

Folders = tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """One class (or None) and one part ("train", "holdout" or None) for each image, and how that was understood."""

    labels: list[str | None]
    parts: list[str | None]
    remarks: list[str]


def understand(folders: Sequence[Folders], labels: str, splits: bool) -> Layout:
    """`folders`: those from the root down to each image.

    Folders around everything mean nothing. With `splits`, folders of one level that are all called train, val, test and
    the like are a split. What is left names the classes: its first folder, with `labels` "path" all of it, with "none"
    nothing. Fewer than two classes tell nothing apart and are none.
    """
    outer, inner = _unwrapped(folders)
    level = _split_level(inner) if splits else None
    names = [] if level is None else sorted({each[level] for each in inner if each})
    parts: list[str | None] = [None] * len(inner)
    if level is not None:
        if not TRAIN.isdisjoint(map(str.lower, names)) and not HOLDOUT.isdisjoint(map(str.lower, names)):
            parts = [
                "holdout" if each[level : level + 1] and each[level].lower() in HOLDOUT else "train" for each in inner
            ]
        inner = _unwrapped([each[:level] + each[level + 1 :] for each in inner])[1]
    found = [_label(each, labels) for each in inner]
    classes = len(set(found) - {None})
    remarks = _split_remarks(names, parts) + _class_remarks(outer, inner, labels, classes)
    if splits and level is None and labels != "none":
        remarks += _mixed_remarks(inner)
    return Layout(found if classes > 1 else [None] * len(inner), parts, remarks)


def _unwrapped(folders: Sequence[Folders]) -> tuple[Folders, list[Folders]]:
    """The folders around everything, and what remains of each."""
    if not folders:
        return (), []
    low, high = min(folders), max(folders)
    common = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:common], [each[common:] for each in folders]


def _split_level(folders: Sequence[Folders]) -> int | None:
    """The first level at which every image that lies in a folder lies in one of a split; there must be two of them."""
    inside = [each for each in folders if each]
    for level in (0, 1):
        if all(len(each) > level and each[level].lower() in TRAIN | HOLDOUT for each in inside):
            return level if len({each[level] for each in inside}) > 1 else None
    return None


def _label(folders: Folders, labels: str) -> str | None:
    if labels == "none" or not folders:
        return None
    return folders[0] if labels == "folders" else "/".join(folders)


def _split_remarks(names: Sequence[str], parts: Sequence[str | None]) -> list[str]:
    if not names:
        return []
    held = [name for name in names if name.lower() in HOLDOUT]
    kept = f"{_listed(held)} held out unless --holdout is given" if "holdout" in parts else "put together"
    return [
        f"The folders {_listed(names)} are taken as a split, not as classes: {kept} "
        "(--source folder:splits=false makes them classes)."
    ]


def _class_remarks(outer: Folders, inner: Sequence[Folders], labels: str, classes: int) -> list[str]:
    if labels == "none":
        return []
    remarks = []
    where = f" below {'/'.join(outer)}/, which is around everything and no class" if outer and classes > 1 else ""
    if classes > 1:
        remarks.append(f"{classes} folders name the classes{where} (--source folder:labels=none: no classes).")
    elif outer or any(inner):
        only = "/".join(outer) or next(each[0] for each in inner if each)
        remarks.append(f"One folder, {only}/, tells nothing apart: no classes.")
    deeper = len({each for each in inner if each})
    if labels == "folders" and deeper > max(1, classes):
        remarks.append(
            f"The images lie in {deeper} folders; those inside another one do not count "
            "(--source folder:labels=path makes each a class)."
        )
    return remarks


def _mixed_remarks(inner: Sequence[Folders]) -> list[str]:
    """Classes called train and val, beside others, are probably none."""
    tops = {each[0] for each in inner if each}
    split = sorted(top for top in tops if top.lower() in TRAIN | HOLDOUT)
    if len(split) > 1 and not TRAIN.isdisjoint(map(str.lower, split)):
        others = _listed(sorted(tops - set(split))[:3])
        return [f"{_listed(split)} count as classes, beside {others}; if they are a split, move the others elsewhere."]
    return []


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"{name}/" for name in names)
