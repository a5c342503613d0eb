"""The order of durable operations: what survives a power cut depends on it, and nothing else shows it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from diffkit import durable


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Operations below the test folder as they come; temporary names are TEMP, a sync says how much is on the disk."""
    operations: list[str] = []

    def name(path: Path | str) -> str:
        relative = os.path.relpath(path, tmp_path)
        return re.sub(r"\.([^/]*?)\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.tmp", r"TEMP(\1)", relative)

    def recorded(what: str, real: Any) -> Any:
        def operation(*arguments: Any) -> Any:
            if what == "sync":
                place = Path(f"/proc/self/fd/{arguments[0]}").readlink()
                size = "" if place.is_dir() else f" {place.stat().st_size}"
                operations.append(f"sync {name(place)}{size}")
            elif what == "write":
                operations.append(f"write {name(arguments[0].name)} {len(arguments[1])}")
            else:
                paths = [name(each) for each in arguments if isinstance(each, Path)]
                operations.append(f"{what} {' '.join(paths)}")
            return real(*arguments)

        return operation

    for what in ("create", "write", "sync", "rename", "remove", "make_folder"):
        monkeypatch.setattr(durable, what, recorded(what, getattr(durable, what)))
    return operations


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc what a descriptor is")


def test_a_file_is_complete_and_synced_before_it_takes_its_name(done: list[str], tmp_path: Path) -> None:
    durable.write_bytes(tmp_path / "a", b"123", b"45")
    assert done == [
        "create TEMP(a)",
        "write TEMP(a) 3",
        "write TEMP(a) 2",
        "sync TEMP(a) 5",
        "rename TEMP(a) a",
        "sync .",
    ]


def test_a_new_file_of_lines_is_known_to_its_folder(done: list[str], tmp_path: Path) -> None:
    durable.append_line(tmp_path / "a", {"b": 1})
    assert done == ["create a", "write a 9", "sync ."]
    done.clear()
    durable.append_line(tmp_path / "a", {"b": "é"})
    durable.sync_path(tmp_path / "a")
    assert done == ["create a", "write a 12", "sync a 21"]
    (tmp_path / "a").write_bytes(b'{"torn')
    durable.append_line(tmp_path / "a", {"b": 2})
    assert (tmp_path / "a").read_bytes() == b'{"torn\n{"b": 2}\n'


def test_each_folder_is_known_to_the_one_above_it(done: list[str], tmp_path: Path) -> None:
    durable.make_folders(tmp_path / "a" / "b")
    assert done == ["make_folder a", "sync .", "make_folder a/b", "sync a"]
    done.clear()
    durable.make_folders(tmp_path / "a" / "b")
    assert done == []


def test_a_folder_is_synced_inside_out_before_it_takes_its_name(done: list[str], tmp_path: Path) -> None:
    with durable.new_folder(tmp_path / "set") as folder:
        (folder / "inner").mkdir()
        durable.write_text(folder / "inner" / "a", "é")
    assert done == [
        "make_folder TEMP(set)",
        "create TEMP(set)/inner/TEMP(a)",
        "write TEMP(set)/inner/TEMP(a) 2",
        "sync TEMP(set)/inner/TEMP(a) 2",
        "rename TEMP(set)/inner/TEMP(a) TEMP(set)/inner/a",
        "sync TEMP(set)/inner",
        "sync TEMP(set)",
        "sync TEMP(set)/inner",
        "rename TEMP(set) set",
        "sync .",
    ]


def test_entries_of_the_current_folder_come_in_the_order_of_their_writing(
    done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with durable.new_folder(Path()) as folder:
        for number, name in enumerate(("z", "a", "m")):
            (folder / name).write_text(name)
            os.utime(folder / name, ns=(0, number))
    inside = "here/TEMP(here)"
    moved = [f"rename {inside}/{name} here/{name}" for name in ("z", "a", "m")]
    assert done == [f"make_folder {inside}", f"sync {inside}", *moved, f"remove {inside}", "sync here"]
    assert sorted(os.listdir(tmp_path / "here")) == ["a", "m", "z"]


def test_names_are_those_of_people(tmp_path: Path) -> None:
    durable.write_json(tmp_path / "a", {"name": "Grün"})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n  "name": "Grün"\n}\n'
    assert durable.json_line({"name": "Grün"}) == '{"name": "Grün"}\n'.encode()
    durable.write_lines(tmp_path / "lines", [{"a": 1}, {"b": 2}])
    assert durable.read_lines(tmp_path / "lines") == [{"a": 1}, {"b": 2}]
    assert durable.temporary_name(tmp_path / ("n" * 61)).name.startswith("." + "n" * 60 + ".")


def test_a_temporary_folder_of_a_living_process_stays_and_its_name_is_not_taken_for_another(tmp_path: Path) -> None:
    mine = durable.temporary_name(tmp_path / "set")
    mine.mkdir()
    durable.remove_stale(tmp_path, "set")
    assert mine.exists() and durable.is_temporary(mine.name) and not durable.is_temporary(mine.name + "x")
    assert durable.vacant(tmp_path)
    (tmp_path / "file").touch()
    assert not durable.vacant(tmp_path) and not durable.vacant(tmp_path / "file")
    durable.sweep(tmp_path)
    assert os.listdir(tmp_path) == ["file"]
