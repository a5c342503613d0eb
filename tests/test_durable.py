"""Durable writes: whole or absent, explained, and nothing left lying about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffkit import durable
from diffkit.errors import DiffkitError, ExitCode


@pytest.mark.parametrize("primitive", ["write", "sync", "rename"])
def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, primitive: str
) -> None:
    file = tmp_path / "file"
    durable.write_bytes(file, b"old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, primitive, fail)
    with pytest.raises(DiffkitError, match="Disk full: need 3 B, have") as caught:
        durable.write_bytes(file, b"new")
    assert caught.value.code == ExitCode.MACHINE
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_torn_line_is_dropped_and_never_glued_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    durable.append_line(file, {"a": 1})
    with file.open("a") as torn:
        torn.write('{"b": 2')
    durable.append_line(file, {"c": 3})
    assert durable.read_lines(file) == [{"a": 1}, {"c": 3}]
    assert durable.read_lines(tmp_path / "none") == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    with pytest.raises(RuntimeError), durable.new_folder(target) as building:
        (building / "x").write_text("half")
        assert not target.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with durable.new_folder(target) as building:
        (building / "x").write_text("whole")
    assert (target / "x").read_text() == "whole"


def test_what_a_killed_builder_left_is_removed_but_not_what_a_living_one_or_another_machine_has(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    token = durable.temporary_name(tmp_path / "set").name
    mine = f"-{os.getpid()}-"
    others = token.replace(token.split(".")[2][:8], "0" * 8)
    names = [
        token,
        token.replace(mine, f"-{gone.pid}-"),
        others.replace(mine, f"-{gone.pid}-"),
        ".set.tmp",
        ".mine.tmp",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    with durable.new_folder(tmp_path / "set"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names, "set"} - {names[1]}


def test_an_error_in_what_is_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), durable.new_folder(tmp_path / "set"):
        raise PermissionError(13, "Permission denied", "a source file")


def test_json_holds_names_that_are_not_utf8(tmp_path: Path) -> None:
    value = {"path": os.fsdecode(b"/data/\xff"), "label": "\u00e9"}
    durable.write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == value
