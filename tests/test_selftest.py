"""The self-test itself: its model of power cuts and its faults, on programs of which the right answer is known."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import call_diffkit
from diffkit.selftest import bench, damage
from diffkit.selftest.bench import Bench, Result, Row, Trial, Untestable, run_row
from diffkit.selftest.powerloss import CONTENTS, Log, Step, read_log

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the record of operations needs /proc")

OLD, NEW = b"old " * 100, b"new " * 100


def record(tmp_path: Path, program: str) -> Log:
    """What a program does under tmp_path/disk, where a file called `file` lies."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "file").write_bytes(OLD)
    script = (
        "from pathlib import Path\n"
        "from diffkit import durable\n"
        "from diffkit.selftest.powerloss import Record\n"
        f"disk, old, new = Path({str(disk)!r}), {OLD!r}, {NEW!r}\n"
        f"Record(disk, Path({str(tmp_path / 'log')!r}))()\n{program}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    return read_log(tmp_path / "log")


def contents(log: Log, name: str) -> set[bytes | None]:
    """All that `name` may hold after a power cut at any time, with any part of what is pending."""
    found: set[bytes | None] = set()
    begin = [step.kind for step in log.steps].index("begin")
    for cut in range(begin + 1, len(log.steps) + 1):
        pending = log.pending(cut)
        for chosen in range(2 ** len(pending)):
            kept = frozenset(number for place, number in enumerate(pending) if chosen >> place & 1)
            for content in CONTENTS:
                pieces = log.layout(cut, kept, content).get(name)
                found.add(None if pieces is None else log._bytes(pieces))
    return found


def test_an_atomic_write_is_the_old_or_the_new_whatever_is_lost(tmp_path: Path) -> None:
    log = record(tmp_path, "durable.write_bytes(disk / 'file', new)")
    assert contents(log, "file") == {OLD, NEW}
    assert log._bytes(log.layout(len(log.steps), frozenset(), "lost")["file"] or ()) == NEW  # and at the end, the new


def test_a_write_without_a_sync_may_be_lost_torn_or_zeroed(tmp_path: Path) -> None:
    program = "temporary = disk / 'x'\nwith durable.create(temporary) as file: durable.write(file, new)\n"
    log = record(tmp_path, program + "durable.rename(temporary, disk / 'file')")
    assert contents(log, "file") == {OLD, NEW, b"", NEW[: len(NEW) // 2], bytes(len(NEW))}


def test_a_name_without_a_sync_of_its_folder_may_be_lost(tmp_path: Path) -> None:
    program = "with durable.create(disk / 'x') as file: durable.write(file, new); durable.sync_file(file)\n"
    assert contents(record(tmp_path, program), "x") >= {None, NEW}
    end = read_log(tmp_path / "log")
    assert "x" not in end.layout(len(end.steps), frozenset(), "whole")


def test_a_folder_is_renamed_with_what_is_in_it_and_removed_piece_by_piece(tmp_path: Path) -> None:
    log = record(tmp_path, "with durable.new_folder(disk / 'a') as made: durable.write_bytes(made / 'b', new)")
    assert contents(log, "a/b") == {None, NEW}
    assert not [name for name in log.layout(len(log.steps), frozenset(), "lost") if name.endswith(".tmp")]
    gone = record_again(tmp_path, "durable.remove(disk / 'a')")
    names = [step.place[1] for step in gone.steps if step.kind == "remove"]
    assert names == ["b", "a"]
    assert gone.layout(len(gone.steps), frozenset(), "lost").keys() >= {"a", "a/b"}


def record_again(tmp_path: Path, program: str) -> Log:
    inner = tmp_path / "again"
    inner.mkdir()
    return record(
        inner, f"with durable.new_folder(disk / 'a') as made: durable.write_bytes(made / 'b', new)\n{program}"
    )


def test_lines_that_are_appended_may_be_cut_but_what_was_synced_stands(tmp_path: Path) -> None:
    program = (
        "durable.append_line(disk / 'lines', {'n': 1}); durable.sync_path(disk / 'lines')\n"
        "durable.append_line(disk / 'lines', {'n': 2})"
    )
    log = record(tmp_path, program)
    one, two = b'{"n": 1}\n', b'{"n": 2}\n'
    begin = next(number for number, step in enumerate(log.steps) if step.data == two)
    cut = {log._bytes(log.layout(begin + 1, frozenset(), content)["lines"] or ()) for content in CONTENTS}
    assert cut == {one, one + two, one + two[: len(two) // 2], one + bytes(len(two))}


def test_the_sync_that_makes_a_step_safe_is_that_of_its_own_folder() -> None:
    steps = (
        Step("begin"),
        Step("folder", 1, (0, "a")),
        Step("create", 2, (1, "b")),
        Step("sync", 2),
        Step("sync", 0),
        Step("sync", 1),
    )
    from diffkit.selftest.powerloss import _safe

    assert [_safe(list(steps), number, 0) for number in (1, 2)] == [4, 5]


PROGRAM = """
import os, sys
from pathlib import Path
from diffkit import durable
from diffkit.selftest.operations import Count, Fault
kind, number, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
(Count(folder / "count") if kind == "count" else Fault(kind, number))()
for name in ("a", "b"):
    try:
        with durable.create(folder / name) as file:
            durable.write(file, b"12345678")
            durable.sync_file(file)
        durable.sync_folder(folder)
    except OSError as error:
        print(name, error.errno)
"""


@pytest.mark.parametrize(
    ("kind", "number", "code", "printed", "left"),
    [
        ("count", 0, 0, "", {"a": 8, "b": 8}),
        ("kill", 6, -9, "", {"a": 8, "b": 0}),
        ("torn", 6, -9, "", {"a": 8, "b": 4}),
        ("short", 2, 0, "a 28\n", {"a": 4, "b": 8}),
        ("full", 2, 0, "a 28\nb 28\n", {"a": 0}),
        ("error", 3, 0, "a 5\n", {"a": 8, "b": 8}),
        ("signal", 5, -15, "", {"a": 8}),
    ],
)
def test_faults(tmp_path: Path, kind: str, number: int, code: int, printed: str, left: dict[str, int]) -> None:
    words = [sys.executable, "-c", PROGRAM, kind, str(number), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (code, printed)
    lines = (tmp_path / "count").read_text().splitlines() if kind == "count" else []
    assert [line.split()[0] for line in lines] == ["create", "write", "sync", "sync"] * 2 * (kind == "count")
    (tmp_path / "count").unlink(missing_ok=True)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == left


def test_a_flip_is_one_bit_and_cuts_are_where_they_should_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3))
    damage.flip(file, 13)
    assert file.read_bytes() == bytes([0, 32, 0])
    assert list(damage.lengths(9000)) == [0, 1, 4096, 8192, 8999]


def test_a_row_counts_what_it_tried_and_stops_when_it_should() -> None:
    def trials(bench: Bench):  # type: ignore[no-untyped-def]
        for number in range(100):
            yield Trial(f"trial {number}", "bad" if number == 3 else "", count=2)

    def untestable(bench: Bench):  # type: ignore[no-untyped-def]
        raise Untestable("not here")
        yield

    nothing: Bench = None  # type: ignore[assignment]
    result = run_row(Row(1, "all", trials, None, False), nothing, None, None)
    assert (result.trials, result.wrong) == (200, ["trial 3: bad"])
    assert run_row(Row(1, "some", trials, None, False), nothing, 9, None).trials == 10
    assert run_row(Row(1, "none", untestable, None, False), nothing, None, None).untestable == "not here"


def test_the_command_tells_what_was_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffkit import selftest

    found = [Result(1, "kills", trials=7), Result(7, "flips", trials=5, wrong=["a bit: passed"])]
    monkeypatch.setattr(selftest, "selftest", lambda folder, **given: iter(found))
    done = call_diffkit("selftest", tmp_path)
    assert done.returncode == 1 and "a bit: passed" in done.stderr and "flips" in done.stdout
    assert json.loads(call_diffkit("selftest", tmp_path, "--json").stdout)[1]["wrong"] == ["a bit: passed"]
    found.pop()
    done = call_diffkit("selftest", tmp_path)
    assert done.returncode == 0 and "7 trials, none wrong" in done.stderr
    assert call_diffkit("selftest", tmp_path, "--row", 99).returncode == 2
    assert call_diffkit("selftest", tmp_path / "none").returncode == 2


def test_trials_write_no_control_sequences_though_the_self_test_runs_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "reports").mkdir()
    program = f"""
from importlib import import_module
from pathlib import Path
from diffkit.selftest import bench, lab
for name in bench.PRELOADED:
    import_module(name)
outcome = lab.Lab(Path({str(tmp_path)!r})).diffkit("prepare", "nothing")
Path({str(tmp_path)!r}, "said").write_text(outcome.output)
"""
    terminal, seen_by_the_program = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color"}
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        timeout=60,
        stdin=seen_by_the_program,
        stdout=seen_by_the_program,
        stderr=seen_by_the_program,
        env=environment,
    )
    os.close(seen_by_the_program)
    os.close(terminal)
    said = (tmp_path / "said").read_text()
    assert said.startswith("Error: There is no nothing.") and "\x1b" not in said


def test_rows_are_numbered_as_the_scorecard() -> None:
    from diffkit.selftest import scorecard

    assert [row.number for row in scorecard()] == list(range(1, 34))
    assert bench.ROWS.keys() == {row.number for row in scorecard()}
