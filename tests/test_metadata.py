"""Tables of labels and folders of pairs, joined to examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffkit.datasets.metadata import Table
from diffkit.datasets.pairs import paired
from diffkit.errors import DiffkitError
from diffkit.interfaces import Example

PIXEL = np.zeros((1, 1, 3), np.uint8)


def examples(*names: str) -> list[Example]:
    return [Example(PIXEL, id=name) for name in names]


def table(tmp_path: Path, text: str, name: str = "labels.csv", **options: object) -> Table:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return Table(path, **options)  # type: ignore[arg-type]


def test_numbers_truths_and_words(tmp_path: Path) -> None:
    text = "file_name,age,smiling,hair\na.png,31,yes,black\nb.png,,no,blond|curly\nc.png,4.5,,?\n"
    a, b, c = table(tmp_path, text).labelled(examples("a.png", "b.png", "c.png"))
    assert a.attributes == {"age": 31, "smiling": 1, "hair=black": 1, "hair=blond": 0, "hair=curly": 0}
    assert b.attributes == {"smiling": 0, "hair=black": 0, "hair=blond": 1, "hair=curly": 1}
    assert c.attributes == {"age": 4.5}


def test_chosen_columns_and_a_class(tmp_path: Path) -> None:
    text = "image\tbreed\tage\tnote\nx/a.png\tpoodle\t3\thello\nx/b.png\tbeagle\t5\t\n"
    found = table(tmp_path, text, "labels.tsv", columns=["age"], class_column="breed")
    a, b = found.labelled(examples("x/a.png", "x/b.png"))
    assert (a.label, a.attributes, b.label, b.attributes) == ("poodle", {"age": 3}, "beagle", {"age": 5})


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.json"])
def test_json_with_lists(tmp_path: Path, name: str) -> None:
    lines = ['{"file_name": "a.png", "tags": ["sea", "sky"]}', '{"file_name": "b.png", "tags": ["sky"], "rain": true}']
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    a, b = table(tmp_path, text, name).labelled(examples("a.png", "b.png"))
    assert a.attributes == {"tags=sea": 1, "tags=sky": 1}
    assert b.attributes == {"tags=sea": 0, "tags=sky": 1, "rain": 1}


def test_a_base_name_is_enough_where_it_is_the_only_one(tmp_path: Path) -> None:
    found = table(tmp_path, "file,age\na.png,1\nx/b.png,2\ny/b.png,3\n")
    one, two, three = found.labelled(examples("deep/a.png", "y/b.png", "z/b.png"))
    assert (one.attributes, two.attributes, three.attributes) == ({"age": 1}, {"age": 3}, None)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("file,age\na.png,1\n", {"columns": ["agee"]}, "no column 'agee'.*Did you mean 'age'"),
        ("file,age\na.png,1\n", {"class_column": "breed"}, "no column 'breed'"),
        ("", {}, "holds no rows"),
        ("file,age\n", {}, "holds no rows"),
        ("file,age\na.png,1,2,3\n", {}, "more cells than its first line"),
        ("file,word\n" + "".join(f"{n}.png,w{n}\n" for n in range(1001)), {}, "1,001 different words"),
    ],
)
def test_a_table_of_no_use_is_refused(tmp_path: Path, text: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(DiffkitError, match=words):
        table(tmp_path, text, **options)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DiffkitError, match="There is no"):
        Table(tmp_path / "none.csv")
    with pytest.raises(DiffkitError, match="cannot be read as a table"):
        table(tmp_path, '{"file": ', "labels.jsonl")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00\x00")
    with pytest.raises(DiffkitError, match="cannot be read as a table"):
        Table(tmp_path / "bytes.csv")


def test_a_table_that_names_none_of_the_images_is_refused(tmp_path: Path) -> None:
    found = table(tmp_path, "file,age\nother.png,1\n")
    with pytest.raises(DiffkitError, match=r"it has 'other.png', they are like 'a.png'"):
        list(found.labelled(examples("a.png")))


def test_pairs_are_found_by_name_whatever_the_type_of_file() -> None:
    inputs = [Example(PIXEL + n, id=name) for n, name in enumerate(("x/a.jpg", "b.webp"), 1)]
    a, b, c = paired(examples("x/a.png", "b.png", "c.png"), inputs)
    assert a.input is not None and b.input is not None and c.input is None
    assert (a.input[0, 0, 0], b.input[0, 0, 0]) == (1, 2)  # type: ignore[index]


def test_pairs_that_cannot_be_told_apart_or_do_not_exist_are_refused() -> None:
    with pytest.raises(DiffkitError, match="Two input images are called 'a'"):
        list(paired(examples("a.png"), examples("a.png", "a.jpg")))
    with pytest.raises(DiffkitError, match=r"the inputs have 'b', the images are like 'a'"):
        list(paired(examples("a.png"), examples("b.png")))
