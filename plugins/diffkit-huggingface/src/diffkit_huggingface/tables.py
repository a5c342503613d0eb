"""From a path or a hub name to one split of a table, without waiting for a hub that does not answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffkit.errors import DiffkitError, ExitCode, did_you_mean

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = {".parquet": "parquet", ".arrow": "arrow"}
TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""


def open_table(path: str, split: str, *, config: str = "", revision: str = "", streaming: bool = False) -> Any:
    """One split, as a `datasets` table. Raises DiffkitError if it is not there or cannot be read."""
    place = Path(path).expanduser()
    if place.exists():
        return _picked(path, _local(place, config), split)
    if not HUB_NAME.fullmatch(path):
        raise DiffkitError(f"There is no file or folder {path}.", "A data set on the hub is written owner/name.")
    unreachable = _unreachable(path, revision)
    if unreachable:
        return _picked(path, _cached(path, config, unreachable), split)
    # Streaming reads the list of splits first, so that a wrong one costs no download.
    table = _picked(path, _loaded(path, config, revision=revision or None, streaming=True), split)
    return table if streaming else _loaded(path, config, revision=revision or None, split=split)


def _local(place: Path, config: str) -> Mapping[str, Any]:
    """Every split of a local data set, read in place."""
    from datasets import load_from_disk

    if place.is_file():
        if place.suffix.lower() not in FILES:
            raise DiffkitError(f"{place} is no parquet or arrow file.", "Give a folder, or one such file.")
        return dict(_loaded(FILES[place.suffix.lower()], config, data_files=str(place), streaming=True))
    if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
        with _explained(str(place)):
            saved = load_from_disk(str(place))
        return saved if isinstance(saved, Mapping) else {str(saved.split or "train"): saved}
    return dict(_loaded(str(place), config, streaming=True))


def _loaded(path: str, config: str, **options: Any) -> Any:
    from datasets import load_dataset

    with _explained(str(options.get("data_files", path))):
        return load_dataset(path, config or None, **options)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """The library's many errors as one, with its own words."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise DiffkitError(
            f"{path} cannot be read as a Hugging Face data set: {reason}",
            "A plain folder of images is read with --source folder.",
            code=ExitCode.DATA,
        ) from error


def _picked(path: str, tables: Mapping[str, Any], split: str) -> Any:
    """The split asked for, or an error that lists those there are."""
    if split not in tables:
        names = list(tables)
        hint = f"{did_you_mean(split, names)}Choose with --source huggingface:split=NAME: {', '.join(names)}."
        raise DiffkitError(f"{path} has no split '{split}'.", hint)
    return tables[split]


def _unreachable(name: str, revision: str) -> str:
    """Why the hub gives no answer, or an empty string. Raises DiffkitError if it answers: no such data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        HfApi().dataset_info(name, revision=revision or None, timeout=TIMEOUT)
    except RevisionNotFoundError as error:
        raise DiffkitError(f"'{name}' on the hub has no revision '{revision}'.") from error
    except RepositoryNotFoundError as error:
        raise DiffkitError(
            f"There is no folder {name} here, and no data set of that name on the hub that you may read.",
            "Check the spelling; for a private or gated one log in first: hf auth login.",
        ) from error
    except Exception as error:
        return f"{type(error).__name__}: {error}".rstrip(": ")
    return ""


def _cached(name: str, config: str, reason: str) -> Mapping[str, Any]:
    """What an earlier download left on this machine. Raises DiffkitError if that is nothing."""
    try:
        with _offline():
            found: Mapping[str, Any] = _loaded(name, config)
    except DiffkitError as error:
        raise DiffkitError(
            f"There is no folder {name} here, the Hugging Face hub cannot be reached ({reason}), and no earlier "
            "download of that name is on this machine.",
            "Check the connection, or fetch it elsewhere with "
            f"hf download {name} --repo-type dataset --local-dir FOLDER and give FOLDER.",
            code=ExitCode.MACHINE,
        ) from error
    return found


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does, for a moment: no attempt to connect, and so no waiting."""
    from datasets import config
    from huggingface_hub import constants

    before = (config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
