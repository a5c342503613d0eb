"""Durable writes: whole or absent, explained, and nothing left lying about."""

from __future__ import annotations

import os
import subprocess
import sys
import time
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
    with pytest.raises(DiffkitError, match="No space left") as caught:
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


def test_what_a_killed_builder_left_is_removed_but_not_what_a_living_one_has(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    old = time.time() - 3600
    for number in (gone.pid, alive.pid):
        folder = tmp_path / f".set.{number}.tmp"
        folder.mkdir()
        os.utime(folder, (old, old))
    try:
        with durable.new_folder(tmp_path / "set"):
            pass
    finally:
        alive.kill()
        alive.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".set.{alive.pid}.tmp", "set"]


def test_an_error_in_what_is_read_is_not_blamed_on_what_is_written(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), durable.new_folder(tmp_path / "set"):
        raise PermissionError(13, "Permission denied", "a source file")
