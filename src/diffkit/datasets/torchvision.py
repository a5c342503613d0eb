"""Dataset source: any class of torchvision.datasets that yields (image, class) pairs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffkit.datasets.imagefile import Refused, one_line
from diffkit.errors import DiffkitError, ExitCode, did_you_mean
from diffkit.interfaces import Example


def torchvision(path: str, *, split: str = "train", root: str = "data", download: bool = False) -> Iterator[Example]:
    """The images of torchvision's dataset class called `path`, such as CIFAR10 or FashionMNIST.

    Files are looked for under `root` and fetched only if `download`. `split` is handed on ("train" or "test"
    for classes that know only these two). A class's name is the label where the data set has names, else its
    number; targets that are not one integer give no label. Raises DiffkitError.
    """
    maker = _find(path)
    dataset = _make(maker, path, _arguments(maker, path, split, root, download), root, download)
    return _examples(dataset, path, split)


def _find(name: str) -> Callable[..., Any]:
    """torchvision's class, whatever the case of `name`."""
    from torchvision import datasets

    known = {key.lower(): key for key in datasets.__all__ if inspect.isclass(getattr(datasets, key))}
    if name.lower() in known:
        maker: Callable[..., Any] = getattr(datasets, known[name.lower()])
        return maker
    near = did_you_mean(name.lower(), known)
    for lower, key in known.items():
        near = near.replace(f"'{lower}'", f"'{key}'")
    raise DiffkitError(
        f"torchvision has no dataset called '{name}'.", f"{near}Try CIFAR10, FashionMNIST or Flowers102."
    )


def _arguments(maker: Callable[..., Any], name: str, split: str, root: str, download: bool) -> dict[str, Any]:
    """What this class calls its root folder, its part and its download."""
    accepted = inspect.signature(maker).parameters
    arguments: dict[str, Any] = {}
    if "split" in accepted:
        arguments["split"] = split
    elif "train" in accepted:
        if split not in {"train", "test"}:
            raise DiffkitError(f"{name} has no split '{split}'.", "Choose split=train or split=test.")
        arguments["train"] = split == "train"
    elif split != "train":
        raise DiffkitError(f"{name} is not divided into splits.", "Leave split out.")
    if "root" in accepted:
        arguments["root"] = root
    if "download" in accepted:
        arguments["download"] = download
    elif download:
        raise DiffkitError(f"torchvision cannot download {name}.", "Fetch it by hand; see torchvision's page on it.")
    return arguments


def _make(maker: Callable[..., Any], name: str, arguments: dict[str, Any], root: str, download: bool) -> Any:
    """The dataset object. torchvision reports downloads on standard output, which belongs to data."""
    try:
        with redirect_stdout(sys.stderr):
            return maker(**arguments)
    except Exception as error:
        raise _explain(error, name, arguments, root, download) from error


def _explain(error: Exception, name: str, arguments: dict[str, Any], root: str, download: bool) -> DiffkitError:
    """torchvision's refusal in our words."""
    detail = one_line(error)
    if isinstance(error, (TypeError, ValueError)):
        return DiffkitError(f"torchvision refuses {name}: {detail}", "Check split, or choose another dataset.")
    if isinstance(error, ImportError):
        return DiffkitError(f"{name} needs another package: {detail}", "Install it.", code=ExitCode.MACHINE)
    if download:
        return DiffkitError(
            f"Downloading {name} failed: {detail}",
            f"Try again, or put its files into {Path(root).absolute()}.",
            code=ExitCode.MACHINE,
        )
    fetch = f"--source torchvision:download=true fetches {name}; " if "download" in arguments else ""
    return DiffkitError(
        f"{name} is not in {Path(root).absolute()} ({detail.rstrip('.')}).",
        f"{fetch}torchvision:root=FOLDER looks elsewhere.",
        code=ExitCode.DATA,
    )


def _examples(dataset: Any, name: str, split: str) -> Iterator[Example]:
    """One Example per item; an item that cannot be read is refused by itself."""
    classes = getattr(dataset, "classes", None) or ()
    for index in range(len(dataset)):
        identity = f"{name}/{split}/{index:06d}"
        try:
            item = dataset[index]
        except Exception as error:
            yield Example(Refused(f"damaged: {one_line(error)}"), id=identity)
            continue
        image = item[0] if isinstance(item, Sequence) and len(item) > 1 else None
        if not isinstance(image, (Image.Image, np.ndarray)):
            raise DiffkitError(f"{name} does not yield pairs of image and class.", "Choose another dataset.")
        yield Example(image, _label(item[1], classes), identity)


def _label(target: Any, classes: Sequence[Any]) -> str | None:
    """The name of an integer class (an int, a numpy integer, a scalar tensor); None for anything else."""
    if isinstance(target, bool) or not hasattr(target, "__index__"):
        return None
    try:
        number = int(target)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not 0 <= number < len(classes):
        return str(number)
    label = classes[number]
    return label if isinstance(label, str) else ", ".join(map(str, label))
