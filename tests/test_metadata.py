"""Tables of labels joined to examples, and the account of the join; folders of pairs."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from diffkit.datasets.metadata import Table
from diffkit.datasets.pairs import paired
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import Account, Example, Listing

PIXEL = np.zeros((1, 1, 3), np.uint8)


def examples(*names: str) -> list[Example]:
    return [Example(PIXEL, id=name) for name in names]


def table(tmp_path: Path, text: str, name: str = "labels.csv", **options: object) -> Table:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    return Table(path, **options)  # type: ignore[arg-type]


def joined(table: Table, *names: str, root: str = "") -> tuple[list[Example], Account]:
    listing = table.join(names, root).labelled(examples(*names))
    return list(listing), listing.account


def attributes(table: Table, *names: str, root: str = "") -> list[dict[str, float] | None]:
    return [None if each.attributes is None else dict(each.attributes) for each in joined(table, *names, root=root)[0]]


def failure(table: Table, *names: str, root: str = "") -> str:
    with pytest.raises(DiffkitError) as caught:
        table.join(names, root)
    assert caught.value.code == ExitCode.DATA
    return str(caught.value)


# What columns give.


def test_numbers_truths_and_words(tmp_path: Path) -> None:
    text = "file_name,age,smiling,hair\na.png,31,yes,black\nb.png,,no,blond|curly\nc.png,4.5,,?\n"
    a, b, c = attributes(table(tmp_path, text), "a.png", "b.png", "c.png")
    assert a == {"age": 31, "smiling": 1, "hair=black": 1, "hair=blond": 0, "hair=curly": 0}
    assert b == {"smiling": 0, "hair=black": 0, "hair=blond": 1, "hair=curly": 1}
    assert c == {"age": 4.5}


def test_chosen_columns_and_a_class(tmp_path: Path) -> None:
    text = "image\tbreed\tage\tnote\nx/a.png\tpoodle\t3\thello\nx/b.png\tbeagle\t5\t\n"
    found = table(tmp_path, text, "labels.tsv", columns=["age"], class_column="breed")
    (a, b), _ = joined(found, "x/a.png", "x/b.png")
    assert (a.label, a.attributes, b.label, b.attributes) == ("poodle", {"age": 3}, "beagle", {"age": 5})


@pytest.mark.parametrize("name", ["labels.jsonl", "labels.json"])
def test_json_with_lists(tmp_path: Path, name: str) -> None:
    lines = ['{"file_name": "a.png", "tags": ["sea", "sky"]}', '{"file_name": "b.png", "tags": ["sky"], "rain": true}']
    text = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    a, b = attributes(table(tmp_path, text, name), "a.png", "b.png")
    assert a == {"tags=sea": 1, "tags=sky": 1}
    assert b == {"tags=sea": 0, "tags=sky": 1, "rain": 1}


@pytest.mark.parametrize("stray", ["unknown", "1,200", "45%", "yes", "inf", "1_0", "1e99", "12 years"])
def test_a_stray_cell_is_unknown_and_named_with_its_line(tmp_path: Path, stray: str) -> None:
    names = [f"{n:02d}.png" for n in range(30)]
    rows = [f'{name},"{stray if n == 7 else 20 + n}"' for n, name in enumerate(names)]
    found, account = joined(table(tmp_path, "\n".join(["file_name,age", *rows])), *names)
    assert [each.attributes for each in found] == [{"age": 20 + n} if n != 7 else {} for n in range(30)]
    ((kind, cells),) = account.problems.items()
    assert kind.startswith("cell unfit") and cells == [f"line 9, age: '{stray}' among numbers"]
    assert account.record["labels"]["columns"] == {"age": {"kind": "numbers", "unknown": 0, "unknown_as": {}}}


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["yes", "no", "maybe"] * 4, "words", {"a=maybe": 0, "a=no": 0, "a=yes": 1}),
        ([*["yes", "no"] * 6, "unknown"], "truths", {"a": 1}),
        (["yes", "0", "1", "no"], "truths", {"a": 1}),
        (["45%", "50 %"], "percentages", {"a": 45}),
        (["1", "2", "x"], "numbers", {"a": 1}),
        (["1", "x", "y"], "words", {"a=1": 1, "a=x": 0, "a=y": 0}),
        (["7", "NaN", "N/A", "-", "null", "?"], "numbers", {"a": 7}),
    ],
)
def test_the_kind_of_a_column(tmp_path: Path, cells: list[str], kind: str, values: dict[str, float]) -> None:
    names = [f"{n:02d}.png" for n in range(len(cells))]
    text = "\n".join(["file_name,a", *map(",".join, zip(names, cells, strict=True))])
    found, account = joined(table(tmp_path, text), *names)
    assert found[0].attributes == values
    assert account.record["labels"]["columns"]["a"]["kind"] == kind


def test_decimal_commas_are_read_between_semicolons_only(tmp_path: Path) -> None:
    german = "file;age\na.png;1,5\nb.png;2\n"
    assert attributes(table(tmp_path, german), "a.png", "b.png") == [{"age": 1.5}, {"age": 2}]
    american = 'file,age\na.png,"1,500"\nb.png,"2,000"\n'
    assert "line 2, column 'age': '1,500' may be a number or a word" in failure(
        table(tmp_path, american), "a.png", "b.png"
    )


def test_unknown_is_never_a_class(tmp_path: Path) -> None:
    cells = ["caf\u00e9", "nan", "cafe\u0301", "NaN", "N/A", ""]
    names = [f"{n}.png" for n in range(6)]
    text = "\n".join(["file,cls", *map(",".join, zip(names, cells, strict=True))])
    found, account = joined(table(tmp_path, text, class_column="cls"), *names)
    assert [each.label for each in found] == ["caf\u00e9", None, "caf\u00e9", None, None, None]
    assert any("4 unknown: N/A, NaN, nan" in remark for remark in account.remarks)


def test_classes_of_a_table_take_the_place_of_those_of_folders(tmp_path: Path) -> None:
    found = table(tmp_path, "file,cls\nx/a.png,cat\n", class_column="cls").join(["x/a.png", "y/b.png"])
    shelves = [Example(PIXEL, "x", "x/a.png"), Example(PIXEL, "y", "y/b.png")]
    assert [each.label for each in found.labelled(shelves)] == ["cat", None]
    found = table(tmp_path, "file,age\nx/a.png,3\n").join(["x/a.png", "y/b.png"])
    assert [(each.label, each.attributes) for each in found.labelled(shelves)] == [("x", {"age": 3}), ("y", None)]


def test_columns_that_are_no_labels_are_left_out_and_said(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(12)]
    rows = [
        {"file_name": name, "id": n, "age": n, "caption": f"photo {n}", "box": [1, 2]} for n, name in enumerate(names)
    ]
    text = "\n".join(map(json.dumps, rows))
    found, account = joined(table(tmp_path, text, "l.jsonl"), *names)
    assert [each.attributes for each in found] == [{"age": n} for n in range(12)]
    assert set(account.record["labels"]["left_out"]) == {"id", "caption", "box"}
    assert any(remark.startswith("Columns left out: id (") for remark in account.remarks)
    assert len(attributes(table(tmp_path, text, "l.jsonl", columns=["caption"]), *names)[0] or {}) == 12
    assert "column 'box': it holds lists of numbers" in failure(
        table(tmp_path, text, "l.jsonl", columns=["box"]), *names
    )


# Which row names which image.


def test_a_base_name_is_enough_where_no_row_has_a_folder(tmp_path: Path) -> None:
    found = table(tmp_path, "file,age\na.png,1\nb.png,2\n")
    assert attributes(found, "deep/a.png", "other/b.png") == [{"age": 1}, {"age": 2}]
    assert (
        "Joined by base name, where only one image fits: 2 of the rows."
        in joined(found, "x/a.png", "b/b.png")[1].remarks
    )
    assert "line 2: 'a.png' may name x/a.png or y/a.png" in failure(found, "x/a.png", "y/a.png")


def test_a_base_name_is_not_enough_where_another_row_has_a_folder(tmp_path: Path) -> None:
    found = table(tmp_path, "file,age\nx/a.png,1\nb.png,2\n")
    assert attributes(found, "x/a.png", "y/b.png") == [{"age": 1}, None]
    # Nor where the folder is the one that the images lie in: the row names the image beside the folders.
    found = table(tmp_path, "file,age\nphotos/a.png,1\nphotos/b.png,2\n")
    assert attributes(found, "x/a.png", "b.png", root="photos") == [None, {"age": 2}]


def test_a_row_of_one_folder_never_labels_another(tmp_path: Path) -> None:
    names = [f"{part}/{n:03d}.png" for part in ("train", "test") for n in range(15)]
    found = table(tmp_path, "file_name,age\n" + "".join(f"{name},{20 + n}\n" for n, name in enumerate(names[:15])))
    examples, account = joined(found, *names)
    assert [each.attributes for each in examples] == [{"age": 20 + n} for n in range(15)] + [None] * 15
    assert account.problems == {"image without a row": names[15:]}


@pytest.mark.parametrize(
    ("row", "image"),
    [
        ("Screenshot 1.02 PM.png", "Screenshot 1.02\\u202fPM.png"),  # as `printable` writes it
        ("Sn\u00edmek v\u00a013.png", "Sn\u00edmek v 13.png"),
        (unicodedata.normalize("NFC", "Sn\u00edmek.png"), unicodedata.normalize("NFD", "Sn\u00edmek.png")),
        (".\\x\\a.png", "x/a.png"),
        ("  ./x//a.png ", "x/a.png"),
        ("\u202ax/a.png", "x/a.png"),
        ("x/A.PNG", "x/a.png"),
        ("x/a", "x/a.png"),
        ("x/a.JPG", "x/a.png"),
        ("photos/x/a.png", "x/a.png"),
        ("C:\\Users\\me\\photos\\x\\a.png", "x/a.png"),
        ("../photos/x/a.jpg", "x/a.png"),
        ("a b.png", "a\\x09b.png"),
        ("a\\b.png", "a\\\\b.png"),
    ],
)
def test_spellings_of_one_name_are_joined(tmp_path: Path, row: str, image: str) -> None:
    found = table(tmp_path, f'file_name,age\n"{row}",7\n')
    assert attributes(found, image, "other/z.png", root="photos") == [{"age": 7}, None]


@pytest.mark.parametrize("row", ["y/a.png", "images/x/a.png", "a.png/x", "x/a.txt", "x/ab.png", "z/x/a.png"])
def test_other_names_are_not(tmp_path: Path, row: str) -> None:
    found = table(tmp_path, f"file_name,age\n{row},7\nx/b.png,8\n")
    examples, account = joined(found, "x/a.png", "x/b.png", "w/c.png", root="photos")
    assert [each.attributes for each in examples] == [None, {"age": 8}, None]
    assert account.problems["row without an image"] == [f"line 2 ({row})"]
    assert account.problems["image without a row"] == ["x/a.png", "w/c.png"]


@pytest.mark.parametrize(
    ("row", "images"),
    [
        ("a", ("a.png", "a.webp")),
        ("Ab.png", ("AB.png", "ab.png")),
        ("caf\u00e9.png", ("caf\u00e9.png", "cafe\u0301.png")),
        ("a b.png", ("a b.png", "a\\xa0b.png")),
    ],
)
def test_a_row_that_may_name_two_images_is_an_error_naming_both(
    tmp_path: Path, row: str, images: tuple[str, str]
) -> None:
    message = failure(table(tmp_path, f"file_name,age\nz.png,1\n{row},2\n"), "z.png", *images)
    assert "line 3" in message
    assert all(image in message or ascii(image) in message for image in images)


def test_twins_with_a_row_each_are_told_apart(tmp_path: Path) -> None:
    twins = ["caf\u00e9.png", "cafe\u0301.png", "A.png", "a.png"]
    found = table(tmp_path, "file_name,age\n" + "".join(f"{name},{n}\n" for n, name in enumerate(twins)))
    assert attributes(found, *twins) == [{"age": n} for n in range(4)]


def test_repeated_rows_agree_or_are_an_error_with_their_lines(tmp_path: Path) -> None:
    text = "file_name,cls\na.png,cat\nb.png,dog\n./a.png, cat\n"
    account = joined(table(tmp_path, text, class_column="cls"), "a.png", "b.png")[1]
    assert account.record["labels"]["repeated"] == ["a.png (line 2, line 4)"]
    assert "Repeated rows that agree: a.png (line 2, line 4)." in account.remarks
    message = failure(table(tmp_path, text + "b.png,cat\n", class_column="cls"), "a.png", "b.png")
    assert "line 3 and line 5 contradict each other about b.png: 'dog' and 'cat' in 'cls'" in message


def test_everything_is_accounted_for(tmp_path: Path) -> None:
    text = "file_name,age\na.png,1\nx.png,2\n,3\nb.png\n"
    account = joined(table(tmp_path, text), "a.png", "b.png", "c.png")[1]
    assert account.problems == {
        "row without a file name": ["line 4"],
        "row without an image": ["line 3 (x.png)"],
        "image without a row": ["c.png"],
        "row with too few cells": ["line 5"],
    }
    record = account.record["labels"]
    assert (record["rows"], record["images"], record["images_with_row"], record["name_column"]) == (
        4,
        3,
        2,
        "file_name",
    )
    assert {kind: each["count"] for kind, each in record["problems"].items()} == dict.fromkeys(account.problems, 1)
    assert json.loads(json.dumps(record)) == record


# The column of names.


@pytest.mark.parametrize("header", ["age,file_name", "age,anything", "id,image_path", ",picture", "file,shot"])
def test_the_column_of_names_is_found_by_its_content(tmp_path: Path, header: str) -> None:
    names = [f"{n:03d}.png" for n in range(5)]
    text = "\n".join([header + ",size", *(f"{n},{name},{n * 10}" for n, name in enumerate(names))])
    assert [(each or {})["size"] for each in attributes(table(tmp_path, text), *names)] == [0, 10, 20, 30, 40]


def test_of_two_columns_of_names_one_must_be_chosen(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(1, 6)]
    text = "num,age\n" + "".join(f"{n},{6 - n}\n" for n in range(1, 6))
    assert "--labels-column" in failure(table(tmp_path, text), *names)
    assert attributes(table(tmp_path, text, name_column="num"), *names) == [{"age": 6 - n} for n in range(1, 6)]
    assert attributes(table(tmp_path, text, name_column="age"), *names) == [{"num": 6 - n} for n in range(1, 6)]
    # The usual name decides where both fit alike.
    usual = text.replace("num", "id")
    assert attributes(table(tmp_path, usual), *names) == [{"age": 6 - n} for n in range(1, 6)]


def test_two_usual_columns_must_name_the_same_images(tmp_path: Path) -> None:
    names = [f"a/{n}.png" for n in range(5)]
    rows = [(f"{n}.png", f"a/{n}.png", f"{4 - n}.png") for n in range(5)]
    agreeing = "file_name,path,age\n" + "".join(f"{file},{path},{n}\n" for n, (file, path, _) in enumerate(rows))
    assert attributes(table(tmp_path, agreeing, columns=["age"]), *names) == [{"age": n} for n in range(5)]
    other = "file_name,image,age\n" + "".join(f"{file},{image},{n}\n" for n, (file, _, image) in enumerate(rows))
    assert "'image' and 'file_name'" in failure(table(tmp_path, other), *names)


def test_an_attribute_comes_from_one_column(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(4)]
    text = "file_name,color,color=red\n" + "".join(f"{n}.png,{'red' if n % 2 else 'blue'},{n}\n" for n in range(4))
    assert "'color' and 'color=red'" in failure(table(tmp_path, text), *names)


def test_numbers_are_not_taken_for_names_beside_a_column_of_names(tmp_path: Path) -> None:
    names = [f"{n}.png" for n in range(1, 100)]
    found = table(tmp_path, "file,age\n" + "".join(f"elsewhere/{name},{100 - n}\n" for n, name in enumerate(names, 1)))
    assert "it has 'elsewhere/1.png' in the column 'file'" in failure(found, *names)
    few = table(tmp_path, "subject,age\n" + "".join(f"s{n},{95 + n}\n" for n in range(20)))
    assert "names none of the images" in failure(few, *names)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("file,age\na.png,1\n", {"columns": ["agee"]}, "no column 'agee'.*Did you mean 'age'"),
        ("file,age\na.png,1\n", {"class_column": "breed"}, "no column 'breed'"),
        ("file,age\na.png,1\n", {"name_column": "fil"}, "no column 'fil'.*Did you mean 'file'"),
        ("a.png,1\nb.png,2\n", {}, r"first line of .* must name the columns, but 'a.png' is an image"),
        ("file,age\nother.png,1\n", {}, r"it has 'other.png' in the column 'file', they are like 'a.png'"),
        (
            "file,word\n" + "".join(f"{n}.png,w{n}\n" for n in range(1001)),
            {"columns": ["word"]},
            "1,001 different words",
        ),
        ("file,word\n" + "".join(f"{n}.png,w{n}\n" for n in range(99)), {}, "no column that can be a label"),
    ],
)
def test_a_table_of_no_use_is_refused(tmp_path: Path, text: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(DiffkitError, match=words) as caught:
        table(tmp_path, text, **options).join(["a.png", *(f"{n}.png" for n in range(1001))])
    assert caught.value.code == ExitCode.DATA


# Pairs.


def test_pairs_are_found_by_name_whatever_the_type_of_file() -> None:
    inputs = [Example(PIXEL + n, id=name) for n, name in enumerate(("x/cafe\u0301.jpg", "b\u00a0c.webp", "d.png"), 1)]
    found = paired(examples("x/caf\u00e9.png", "b c.png", "c.png"), inputs)
    a, b, c = found
    assert a.input is not None and b.input is not None and c.input is None
    assert (a.input[0, 0, 0], b.input[0, 0, 0]) == (1, 2)  # type: ignore[index]
    assert found.account.problems == {"input without an image": ["d.png"]}


def test_accounts_of_images_and_inputs_are_kept() -> None:
    images = Listing(examples("a.png"), Account(["so"], {"x": ["y"]}, [("b.heic", "why")], {"layout": 1}))
    inputs = Listing(examples("a.jpg"), Account(skipped=[("c.heic", "why")]))
    found = paired(images, inputs)
    assert len(list(found)) == 1
    assert found.account == Account(["so"], {"x": ["y"]}, [("b.heic", "why"), ("c.heic", "why")], {"layout": 1})


def test_pairs_that_cannot_be_told_apart_or_do_not_exist_are_refused() -> None:
    with pytest.raises(DiffkitError, match=r"Two input images are called 'a': a.png and a.jpg"):
        list(paired(examples("a.png"), examples("a.png", "a.jpg")))
    with pytest.raises(DiffkitError, match=r"Two images that have an input are called 'a': a.png and a.jpg"):
        list(paired(examples("a.png", "a.jpg"), examples("a.png")))
    with pytest.raises(DiffkitError, match=r"the inputs have 'b', the images are like 'a'"):
        list(paired(examples("a.png"), examples("b.png")))
