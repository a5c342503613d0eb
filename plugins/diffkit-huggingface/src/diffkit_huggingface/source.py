"""The dataset source `huggingface`: open the right table, choose its columns, yield images undecoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Example
from diffkit_huggingface.columns import class_folders, class_name, find_image_column, find_label_column
from diffkit_huggingface.images import undecoded
from diffkit_huggingface.tables import open_table


def huggingface(
    path: str,
    *,
    split: str = "train",
    image_column: str = "",
    label_column: str = "",
    config: str = "",
    revision: str = "",
    streaming: bool = False,
) -> Iterator[Example]:
    """Images and classes of a Hugging Face data set: a local folder or file, or `owner/name` on the hub.

    Local: image folders with `metadata.csv` or `metadata.jsonl`, parquet files or folders of them, and what
    `save_to_disk` wrote. They are read where they are, nothing is copied.

    split: which part; image_column and label_column: empty = found by itself, label_column=none = no classes;
    config: the configuration of a data set that has several; revision: a branch, tag or commit on the hub;
    streaming: read from the hub as it comes, instead of downloading all and keeping it in the local cache.

    Images stay encoded until they are asked for, so a damaged one costs only itself. Raises DiffkitError if
    there is no such data set, split or column, or if the hub cannot be reached.
    """
    table = open_table(path, split, config=config, revision=revision, streaming=streaming)
    features = dict(table.features or {})
    image = find_image_column(features, image_column)
    root = Path(path).expanduser().absolute()
    folders = class_folders(root) if root.is_dir() else set()
    label = find_label_column(features, image, label_column, by_folder=bool(folders))
    by_folder = not label and label_column != "none"
    return _examples(_narrowed(table, image, label), root, split, image, label, folders if by_folder else set())


def _narrowed(table: Any, image: str, label: str) -> Any:
    """Only the columns wanted, with images as they are stored."""
    from datasets import Image

    table = table.select_columns([image, label] if label else [image])
    if isinstance(table.features[image], Image):
        table = table.cast_column(image, Image(decode=False))
    return table


def _examples(table: Any, root: Path, split: str, image: str, label: str, folders: set[str]) -> Iterator[Example]:
    seen: set[str] = set()
    for index, row in enumerate(_rows(table, root)):
        picture = undecoded(row[image])
        name = f"{split}/{index}"
        if isinstance(picture, Path) and picture.is_relative_to(root):
            name = picture.relative_to(root).as_posix()
        # A metadata file may list one image twice.
        name = f"{name}#{index}" if name in seen else name
        seen.add(name)
        kind = class_name(table.features[label], row.get(label)) if label else None
        if isinstance(picture, Path) and picture.parent.name in folders:
            kind = picture.parent.name
        yield Example(picture, label=kind, id=name)


def _rows(table: Any, root: Path) -> Iterator[dict[str, Any]]:
    """The rows; what the library raises on the way becomes a DiffkitError that says how far it came."""
    rows, count = iter(table), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DiffkitError(
                f"{root.name} breaks off after {count} rows: {type(error).__name__}: {error}",
                "Is the file complete? Download or write it again.",
                code=ExitCode.DATA,
            ) from error
        yield row
        count += 1
