"""Tables as they are in the world: delimiters, encodings, headers, line ends, JSON of several shapes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from diffkit.datasets import tablefile
from diffkit.datasets.tablefile import Sheet, read_sheet
from diffkit.errors import DiffkitError, ExitCode


def sheet(tmp_path: Path, content: str | bytes, name: str = "labels.csv") -> Sheet:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_sheet(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [
        {"name": f"café {n}.png", "size": str(n), "note": note}
        for n, note in enumerate(["a,b;c", 'say "x"', "l\nm", ""])
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["name", "size", "note"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    found = sheet(tmp_path, text.getvalue().encode(encoding), "labels.txt")
    assert (found.columns, found.rows, found.delimiter) == (["name", "size", "note"], rows, delimiter)
    assert [found.where(n) for n in range(4)] == ["line 2", "line 3", "line 4", "line 6"]
    assert ("cp1252" if encoding == "cp1252" else "UTF") in found.form


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c", "\x1d", "\x1e"])
def test_only_line_ends_end_a_line(tmp_path: Path, mark: str) -> None:
    found = sheet(tmp_path, f"file,w\na.png,x{mark}y\nb.png,z\n")
    assert [row["w"] for row in found.rows] == [f"x{mark}y", "z"]
    lines = [json.dumps({"file": "a.png", "w": f"x{mark}y"}, ensure_ascii=False), '{"file": "b.png", "w": "z"}']
    assert sheet(tmp_path, "\n".join(lines), "l.jsonl").rows == [
        {"file": "a.png", "w": f"x{mark}y"},
        json.loads(lines[1]),
    ]


@pytest.mark.parametrize(
    ("text", "columns", "first"),
    [
        ("file , age\n a.png , 3\n", ["file", "age"], {"file": "a.png ", "age": "3"}),
        ('"file", "age"\n"a.png", "3"\n', ["file", "age"], {"file": "a.png", "age": "3"}),
        ("sep=;\r\nfile;age\r\na.png;3\r\n", ["file", "age"], {"file": "a.png", "age": "3"}),
        ("file,age\ra.png,3\r", ["file", "age"], {"file": "a.png", "age": "3"}),
        (",file\n0,a.png\n", ["column 1", "file"], {"column 1": "0", "file": "a.png"}),
        ("Unnamed: 0,file\n0,a.png\n", ["column 1", "file"], {"column 1": "0", "file": "a.png"}),
        ("file,age,\na.png,3,\n", ["file", "age"], {"file": "a.png", "age": "3"}),
        ("\n\nfile,age\n\n,\na.png,3\n", ["file", "age"], {"file": "a.png", "age": "3"}),
        ("file,hair\na.png,red|long\n", ["file", "hair"], {"file": "a.png", "hair": "red|long"}),
        ("file;note\na.png;one, two\nb.png;x\n", ["file", "note"], {"file": "a.png", "note": "one, two"}),
    ],
)
def test_everyday_forms(tmp_path: Path, text: str, columns: list[str], first: dict[str, str]) -> None:
    found = sheet(tmp_path, text)
    assert (found.columns, found.rows[0]) == (columns, first)


def test_rows_that_end_early_are_noted(tmp_path: Path) -> None:
    found = sheet(tmp_path, "file,a,b\nx.png,1,2\ny.png,1\n")
    assert found.rows[1] == {"file": "y.png", "a": "1"}
    assert [found.where(row) for row in found.short] == ["line 3"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.json", '[{"file_name": "a.png", "label": 3}, {"file_name": "b.png", "label": 4}]'),
        ("l.json", '{"a.png": 3, "b.png": 4}'),
        ("l.json", '{"a.png": {"label": 3}, "b.png": {"label": 4}}'),
        ("l.json", '{"labels": [["a.png", 3], ["b.png", 4]]}'),
        ("l.json", '{"file_name": "a.png", "label": 3}\n{"file_name": "b.png", "label": 4}\n'),
        ("l.txt", '{"file_name": "a.png", "label": 3}\r\n{"file_name": "b.png", "label": 4}\r\n'),
        ("l.ndjson", '\ufeff{"file_name": "a.png", "label": 3}\n\n{"file_name": "b.png", " label": 4}\n'),
    ],
)
def test_json_of_several_shapes(tmp_path: Path, name: str, text: str) -> None:
    found = sheet(tmp_path, text, name)
    assert found.rows == [{"file_name": "a.png", "label": 3}, {"file_name": "b.png", "label": 4}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("l.csv", "", "holds no rows"),
        ("l.csv", "file,age\n", "holds no rows"),
        ("l.csv", "file\na.png\n", "names one column only"),
        ("l.csv", "file,age\na.png,1\nb.png,1,2\n", "line 3 has 3 cells, but the first line names 2"),
        ("l.csv", "sep=,\nfile,age\na.png,1,2\n", "line 3 has 3 cells"),
        ("l.csv", "file,age,age\na.png,1,2\n", "names the column 'age' twice"),
        ("l.csv", 'file,age\na.png,1\nb.png,"2\nc.png,3\n', "begins on line 3"),
        ("l.csv", b"\xff\xfe\x00\x00\x01", "cannot be read as a table"),
        ("l.csv", b"file,age\na\0b,1\n", "not text"),
        ("l.csv", b"file,age\n\x81\x8d,1\n", "neither UTF-8, UTF-16 nor cp1252"),
        ("l.csv", b"PK\x03\x04...", "a spreadsheet"),
        ("l.jsonl", '{"file": "a"}\n{"file": \n', "line 2: Expecting value"),
        ("l.jsonl", '{"file": "a"}\n[1]\n', "line 2 is not an object"),
        ("l.jsonl", '{"file": "a", "x": "\\ud800"}\n', "line 1 holds half a character"),
        ("l.jsonl", '{"a": 1, " a": 2}\n', "the key 'a' stands twice"),
        ("l.json", '{"a.png": 1, "a.png": 2}', "the key 'a.png' stands twice"),
        ("l.json", "3", "neither a list of objects nor"),
        ("l.json", "[" * 100_000, "cannot be read as a table"),
    ],
)
def test_what_is_no_table_is_refused_with_the_line(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    with pytest.raises(DiffkitError, match=words) as caught:
        sheet(tmp_path, content, name)
    assert caught.value.code == ExitCode.DATA


def test_a_missing_table_suggests_its_sibling(tmp_path: Path) -> None:
    sheet(tmp_path, "file,age\na.png,1\n")
    with pytest.raises(DiffkitError, match=r"There is no .*Did you mean 'labels.csv'"):
        read_sheet(tmp_path / "label.csv")
    with pytest.raises(DiffkitError, match="Is a directory"):
        read_sheet(tmp_path)


def test_a_table_is_read_no_further_than_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "file,age\na.png,1\n"
    monkeypatch.setattr(tablefile, "LARGEST", len(text))
    assert sheet(tmp_path, text).rows == [{"file": "a.png", "age": "1"}]
    for path in (tmp_path / "longer.csv", Path("/dev/zero")):
        if not path.exists():
            path.write_text(text + "\n")
        with pytest.raises(DiffkitError, match="larger than") as caught:
            read_sheet(path)
        assert caught.value.code == ExitCode.DATA
