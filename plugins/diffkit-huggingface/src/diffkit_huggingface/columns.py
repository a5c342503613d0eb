"""Which column holds the images, which the classes, and what a class is called."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffkit.errors import DiffkitError, ExitCode, did_you_mean

IMAGE_NAMES = ("image", "img", "picture", "photo")
LABEL_NAMES = ("label", "labels", "class", "class_name", "category", "target", "cls", "fine_label")
# Text columns that tell images apart instead of putting them into classes.
FREE_TEXT = {"text", "caption", "captions", "prompt", "description", "title", "name", "id", "key", "url", "path"}
FREE_TEXT |= {"file_name", "filename", "image_id", "md5", "sha256", "hash", "license", "source", "__key__", "__url__"}
SPLITS = {"train", "training", "test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def find_image_column(features: dict[str, Any], asked: str) -> str:
    """The column asked for, or else the only one with images, or the one with the usual name."""
    found = [name for name, feature in features.items() if _is_image(feature)]
    found = found or [name for name, feature in features.items() if _dtype(feature) in ("binary", "large_binary")]
    if asked:
        _require_known(asked, features)
        if asked not in found:
            raise _no_use(f"Column '{asked}' holds no images but {features[asked]}.", "image_column", found)
        return asked
    usual = [name for name in IMAGE_NAMES if name in found]
    if len(found) == 1 or usual:
        return (usual or found)[0]
    what = "More than one column holds images" if found else "No column holds images"
    raise _no_use(f"{what}; the columns are {_listed(features)}.", "image_column", found)


def find_label_column(features: dict[str, Any], image: str, asked: str, *, by_folder: bool) -> str:
    """The column asked for, or else the best candidate; empty when there are no classes or folders name them.

    In this order: a usual name, the only ClassLabel, class folders, the only column of text that is not free text.
    """
    from datasets import ClassLabel

    labels = [name for name, feature in features.items() if name != image and _is_label(feature)]
    usable = [name for name in labels if not _names_splits(features[name])]
    if asked == "none":
        return ""
    if asked:
        _require_known(asked, features)
        if asked not in usable:
            held = f"Column '{asked}' holds {features[asked]}, not classes (text or whole numbers)."
            raise _no_use(held, "label_column", usable)
        return asked
    by_name = {name.lower(): name for name in reversed(usable)}
    for name in LABEL_NAMES:
        if name in by_name:
            return by_name[name]
    classes = [name for name in usable if isinstance(features[name], ClassLabel)]
    if len(classes) == 1 or by_folder:
        return classes[0] if len(classes) == 1 else ""
    texts = [name for name in usable if "string" in _dtype(features[name]) and name.lower() not in FREE_TEXT]
    return texts[0] if len(texts) == 1 else ""


def class_name(feature: Any, value: Any) -> str | None:
    """A row's class as text; None where it has none (null, -1 of a ClassLabel, empty text)."""
    names = getattr(feature, "names", None)
    if names is not None and isinstance(value, int):
        return str(names[value]) if 0 <= value < len(names) else None
    return None if value is None else str(value).strip() or None


def class_folders(root: Path) -> set[str]:
    """Names of the folders under `root` that hold images, if there are two or more: one for each class."""
    names = set()
    for folder, _, files in os.walk(root):
        if Path(folder) != root and any(Path(name).suffix.lower() in SUFFIXES for name in files):
            names.add(Path(folder).name)
    names = {name for name in names if name.lower() not in SPLITS}
    return names if len(names) > 1 else set()


def _is_image(feature: Any) -> bool:
    """The Image feature, or what plain parquet makes of it: a struct of bytes and path."""
    from datasets import Image

    return isinstance(feature, Image) or (isinstance(feature, dict) and {"bytes", "path"} <= set(feature))


def _is_label(feature: Any) -> bool:
    from datasets import ClassLabel

    dtype = _dtype(feature)
    return isinstance(feature, ClassLabel) or dtype == "bool" or "string" in dtype or "int" in dtype


def _names_splits(feature: Any) -> bool:
    """Whether the classes are train, test and the like: what the library makes of train/*.png and test/*.png."""
    names = getattr(feature, "names", None) or ["a class"]
    return all(name.lower() in SPLITS for name in names)


def _dtype(feature: Any) -> str:
    """The type of a column of plain values, else an empty string."""
    from datasets import Value

    return str(feature.dtype) if isinstance(feature, Value) else ""


def _require_known(asked: str, features: dict[str, Any]) -> None:
    if asked not in features:
        raise DiffkitError(
            f"No column '{asked}'.", f"{did_you_mean(asked, features)}The columns are {_listed(features)}."
        )


def _no_use(message: str, option: str, found: list[str]) -> DiffkitError:
    """What is wrong, and how to choose among the columns that would do."""
    if found:
        hint = f"Choose with --source huggingface:{option}=NAME, where NAME is {' or '.join(found)}."
    else:
        hint = "Is this a data set of images?" if option == "image_column" else "Choose label_column=none."
    return DiffkitError(message, hint, code=ExitCode.DATA)


def _listed(features: dict[str, Any]) -> str:
    return ", ".join(features) or "unknown"
