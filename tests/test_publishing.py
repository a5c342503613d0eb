"""Groups of files: the order of what is done to the disk, and what is left after errors."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import call_diffkit
from diffkit import durable
from diffkit.engine.publishing import Publisher
from diffkit.errors import DiffkitError, ExitCode
from test_durable_order import done

__all__ = ["done"]
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc what a descriptor is")


@on_linux
def test_all_files_of_a_group_are_synced_before_any_has_its_name(done: list[str], tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    names = [tmp_path / "a", tmp_path / "b" / "c"]
    durable.publish({path: durable.write_aside(path, b"123") for path in names})
    synced = sorted(done[4:6])  # at the same time
    assert synced == ["sync TEMP(a) 3", "sync b/TEMP(c) 3"]
    done[4:6] = synced
    assert done == [
        *("create TEMP(a)", "write TEMP(a) 3", "create b/TEMP(c)", "write b/TEMP(c) 3"),
        *synced,
        *("rename TEMP(a) a", "rename b/TEMP(c) b/c"),
        *("sync .", "sync b"),
    ]
    assert [path.read_bytes() for path in names] == [b"123"] * 2


@on_linux
def test_a_record_comes_after_its_file_and_is_one_write(done: list[str], tmp_path: Path) -> None:
    records = tmp_path / "records"

    def published(paths: Sequence[Path]) -> None:
        durable.append_lines(records, [{"file": path.name} for path in paths])

    with Publisher(published) as publisher:
        publisher.put({tmp_path / name: partial(bytes, 2) for name in ("a", "b")})
    last = max(done.index("rename TEMP(a) a"), done.index("rename TEMP(b) b"))
    assert done[last:] == [done[last], "sync .", "create records", "write records 28", "sync ."]
    assert [record["file"] for record in durable.read_lines(records)] == ["a", "b"]


def test_what_is_put_while_a_group_is_published_is_one_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, begun, groups = threading.Event(), threading.Event(), list[int]()
    real = durable.publish

    def slow(aside: dict[Path, Path]) -> None:
        begun.set()
        assert free.wait(20)
        real(aside)

    monkeypatch.setattr(durable, "publish", slow)
    with Publisher(lambda paths: groups.append(len(paths))) as publisher:
        for number in range(6):
            publisher.put({tmp_path / f"{number}-{each}": partial(bytes, number) for each in range(2)})
            assert begun.wait(20)
        free.set()
    assert groups == [2, 10]
    assert len(os.listdir(tmp_path)) == 12


@pytest.mark.parametrize("failing", ["create", "write", "sync", "rename"])
def test_an_error_is_raised_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    real, calls = getattr(durable, failing), list[None]()

    def fails_once(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(durable, failing, fails_once)
    recorded: list[Path] = []
    with pytest.raises(DiffkitError) as caught, Publisher(recorded.extend) as publisher:
        for number in range(10):
            publisher.put({tmp_path / f"{number}-{each}": partial(bytes, 9) for each in range(2)})
    assert caught.value.code == ExitCode.MACHINE
    there = sorted(os.listdir(tmp_path))
    assert not any(map(durable.is_temporary, there))
    assert all((tmp_path / name).stat().st_size == 9 for name in there)
    assert {path.name for path in recorded} <= set(there)


def test_an_error_of_the_work_beside_it_keeps_what_was_written(tmp_path: Path) -> None:
    recorded: list[Path] = []
    with pytest.raises(KeyboardInterrupt), Publisher(recorded.extend) as publisher:
        for number in range(4):
            publisher.put({tmp_path / f"{number}": partial(bytes, 9)})
        raise KeyboardInterrupt
    assert sorted(path.name for path in recorded) == sorted(os.listdir(tmp_path)) == ["0", "1", "2", "3"]


def test_a_content_that_cannot_be_made_is_raised(tmp_path: Path) -> None:
    def bad() -> bytes:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"), Publisher(lambda paths: None) as publisher:
        publisher.put({tmp_path / "good": bytes, tmp_path / "bad": bad})
    assert os.listdir(tmp_path) == ["good"]


def test_samples_have_their_records_in_order(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call_diffkit("sample", run, "-o", out, "-n", 12, "--steps", 2, "--batch-size", 5, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(12))
    assert all((out / record["file"]).exists() for record in records)
    assert not list(out.rglob("*.tmp"))
