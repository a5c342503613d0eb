"""Output is best effort: whatever becomes of its reader, the work goes on and ends with the code of the work."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.table import Table

from conftest import TINY, run_diffkit, write_images
from diffkit.cli import compare, output
from diffkit.cli.console import _Data
from diffkit.cli.live import fitting
from diffkit.cli.output import Stream
from diffkit.measure.estimate import Estimate
from diffkit.measure.tradeoff import Candidate

DIFFKIT = [sys.executable, "-m", "diffkit"]
FULL = Path("/dev/full")


def test_writes_to_a_pipe_that_nobody_reads_any_more_are_dropped() -> None:
    reader, writer = os.pipe()
    stream = Stream(writer, None)
    assert stream.write(b"kept") == 4
    assert os.read(reader, 10) == b"kept"
    os.close(reader)
    assert stream.write(b"dropped") == 7
    os.close(writer)
    assert stream.write(b"dropped too") == 11


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_writes_to_a_full_disk_are_dropped_and_so_is_what_is_left_at_the_end() -> None:
    with FULL.open("wb") as full:
        text = io.TextIOWrapper(io.BufferedWriter(Stream(full.fileno(), 1.0)), encoding="ascii")
        print("lost", file=text)
        text.flush()
        print("lost at the end", file=text)
        text.close()


def test_a_reader_that_has_stopped_is_waited_for_once_and_gets_what_comes_when_it_reads_again() -> None:
    reader, writer = os.pipe()
    stream = Stream(writer, 0.2)
    begun = time.monotonic()
    for _ in range(500):  # 2 MB into a pipe that holds 64 KiB
        stream.write(b"." * 4096)
    assert 0.2 <= time.monotonic() - begun < 1.0
    while select.select([reader], [], [], 0)[0]:
        os.read(reader, 2**20)
    stream.write(b"again")
    assert os.read(reader, 2**20) == b"again"


def test_a_terminal_that_has_stopped_does_not_hold_the_work_up() -> None:
    master, slave = pty.openpty()
    stream = Stream(slave, 0.2)
    writing = threading.Thread(target=lambda: [stream.write(b"." * 1000) for _ in range(300)], daemon=True)
    writing.start()
    writing.join(5)
    assert not writing.is_alive()
    assert stream.isatty() and os.isatty(stream.fileno())
    os.close(master)
    assert stream.write(b"closed") == 6
    os.close(slave)


def test_data_wait_for_a_slow_reader_and_arrive_whole() -> None:
    reader, writer = os.pipe()
    stream, found = Stream(writer, None), []
    data = bytes(range(256)) * 4096

    def read() -> None:
        while sum(map(len, found)) < len(data):
            time.sleep(0.01)
            found.append(os.read(reader, 2**18))

    reading = threading.Thread(target=read)
    reading.start()
    stream.write(data)
    reading.join()
    assert b"".join(found) == data


def test_a_message_from_a_signal_handler_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    monkeypatch.setattr(output, "_messages", Stream(writer, 60.0))
    begun = time.monotonic()
    for _ in range(100_000 // 50):
        output.notify("." * 50)
    assert time.monotonic() - begun < 5
    assert set(os.read(reader, 2**20)) == {ord(".")}


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`bash -c` with $DK for diffkit; the exit codes of the last pipe are on its last line."""
    names = {**os.environ, "DK": " ".join(DIFFKIT), **environment}
    script = f"{command}; echo ${{PIPESTATUS[@]}}"
    return subprocess.run(["bash", "-c", script], env=names, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "command",
    [
        "$DK plugins list --json | true",
        "$DK plugins list <&- >&- 2>&-",
    ],
)
def test_without_a_reader_a_listing_ends_well(command: str) -> None:
    done = shell(command)
    assert done.stdout.splitlines()[-1].split()[0] == "0"
    assert done.stderr == ""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_data_that_a_full_disk_does_not_take_are_said_to_be_lost() -> None:
    done = shell("$DK plugins list --json >/dev/full")
    assert done.stdout.split() == ["0"]
    assert done.stderr == "Standard output is incomplete: no space left on the disk.\n"


def test_usage_errors_keep_their_code_without_a_reader() -> None:
    assert shell("$DK train 2>/dev/full").stdout.split() == ["2"]
    assert shell("$DK plugins show nothing 2>&-").stdout.split() == ["2"]


def test_a_closed_descriptor_is_not_taken_by_a_file(tmp_path: Path) -> None:
    """What is printed must not end up in the first file that is opened."""
    code = (
        "import sys\nfrom diffkit.cli.output import protect\nprotect()\n"
        f"file = open({str(tmp_path / 'precious')!r}, 'wb', buffering=0)\nfile.write(b'mine')\n"
        "print('out'); print('err', file=sys.stderr)\n"
    )
    done = subprocess.run(
        ["bash", "-c", '"$@" <&- >&- 2>&-', "-", sys.executable, "-c", code], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert (tmp_path / "precious").read_bytes() == b"mine"


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with classes that ASCII and cp1252 do not have."""
    folder = tmp_path_factory.mktemp("cats")
    write_images(folder / "images", {"\u732b": 6, "caf\u00e9 \U0001f63a": 6})
    done = run_diffkit("prepare", "images", "-o", "set", "--size", 12, cwd=folder, FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert done.returncode == 0, done.stderr
    assert "\x1b[2K" not in done.stderr and "\x1b[?25l" not in done.stderr  # no bar, whatever the colours
    return folder / "set"


@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252", "utf-8"])
def test_any_encoding_will_do_and_json_stays_json(cats: Path, encoding: str) -> None:
    shown = shell(f"$DK show {cats} | iconv -f {encoding.split(':')[0]} -t utf-8", PYTHONIOENCODING=encoding)
    assert shown.stdout.splitlines()[-1] == "0 0", shown.stderr
    assert ("\u732b" if encoding == "utf-8" else "\\u732b") in shown.stdout
    data = run_diffkit("show", cats, "--json", PYTHONIOENCODING=encoding)
    assert set(json.loads(data.stdout)["classes"]) == {"\u732b", "caf\u00e9 \U0001f63a"}


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_images_are_prepared_whichever_descriptors_are_closed(cats: Path, tmp_path: Path, closed: str) -> None:
    """The processes that decode must not take one for another."""
    done = shell(f"timeout 60 $DK prepare {cats.with_name('images')} -o {tmp_path / 'set'} --size 12 {closed}")
    assert done.stdout.split() == ["0"]
    shards = [(folder / "images-00000.npy").read_bytes() for folder in (tmp_path / "set", cats)]
    assert shards[0] == shards[1]


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_work_whose_log_is_on_a_full_disk_is_done_like_any_other(cats: Path, tmp_path: Path) -> None:
    command = [*DIFFKIT, "prepare", cats.with_name("images"), "-o", tmp_path / "set", "--size", 12]
    with FULL.open("wb") as full:
        done = subprocess.run(list(map(str, command)), stdout=full, stderr=full, check=False, timeout=120)
    assert done.returncode == 0
    shards = [(folder / "images-00000.npy").read_bytes() for folder in (tmp_path / "set", cats)]
    assert shards[0] == shards[1]


def test_a_training_whose_terminal_is_closed_saves_and_can_be_resumed(dataset: Path, tmp_path: Path) -> None:
    """The terminal goes while bars are drawn on it: the kernel sends SIGHUP, and every further write is an error."""
    run = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        options = ["--steps", "1000000", "--preview-every", "0", *TINY]
        os.execvp(DIFFKIT[0], [*DIFFKIT, "train", str(dataset), "-o", str(run), *options])
    drawn = b""
    while b"loss" not in drawn:
        assert select.select([terminal], [], [], 60)[0], drawn
        drawn += os.read(terminal, 2**16)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    saved = {folder.name for folder in (run / "checkpoints").glob("images-*")}
    assert len(saved - {"images-000000000000"}) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_while_a_command_is_starting_is_no_traceback(run: Path, tmp_path: Path, name: str) -> None:
    begun = time.monotonic()
    process = subprocess.Popen(
        [*DIFFKIT, "sample", str(run), "-o", str(tmp_path / "s")], stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.7)  # torch takes longer than that
    process.send_signal(getattr(signal, name))
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "Interrupted.\n"
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "s").exists()


def test_tables_lose_nothing_however_narrow_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1")
    cells = [f"cell-{number}" for number in range(6)]
    table = Table(*cells, box=None)
    table.add_row(*cells)
    console = _Data(file=io.StringIO(), soft_wrap=True)
    console.print(table)
    assert console.file.getvalue().split() == 2 * cells  # type: ignore[attr-defined]


def test_in_a_pipe_no_cell_of_a_table_is_cut_or_folded() -> None:
    listed = run_diffkit("plugins", "list").stdout
    parts = json.loads(run_diffkit("plugins", "list", "--json").stdout)["parts"]
    assert len(parts) > 20
    for part in parts:
        assert any(part["name"] in line and line.rstrip().endswith(part["summary"]) for line in listed.splitlines())


TALKATIVE = """
import sys
from diffkit.core.samplers.onestep import euler
from diffkit import hookimpl

def talkative(denoise, x, sigmas, noise):
    if not sys.stdout.closed:
        print("a step")
        {more}
    yield from euler(denoise, x, sigmas, noise)

@hookimpl
def samplers():
    return {{"talkative": talkative}}
"""


@pytest.mark.parametrize("more", ["", "sys.stdout.close()"])
def test_what_a_part_prints_is_no_data(run: Path, tmp_path: Path, more: str) -> None:
    info = tmp_path / "talkative-1.0.dist-info"
    info.mkdir()
    (tmp_path / "talkative.py").write_text(TALKATIVE.format(more=more))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: talkative\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffkit]\ntalkative = talkative\n")
    options = ("--sampler", "talkative", "-n", 2, "--steps", 2, "--device", "cpu", "-o", tmp_path / "out")
    done = run_diffkit("sample", run, *options, "--json", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sampler"] == "talkative"
    assert more or "a step" in done.stderr


def test_the_line_of_a_training_drops_its_last_figures_where_they_do_not_fit() -> None:
    texts = ["304 / 9,600 images", "loss 0.9840", "56 img/s", "2m47s left", "728 MiB"]
    assert fitting(texts, 200) == "  ".join(texts)
    assert fitting(texts, 53) == "304 / 9,600 images  loss 0.9840  56 img/s  2m47s left"
    assert fitting(texts, 52) == "304 / 9,600 images  loss 0.9840  56 img/s"
    assert fitting(texts, 3) == "304 / 9,600 images"


def test_the_table_of_compare_loses_nothing_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    scheduler = "karras:sigma_min=0.002,sigma_max=80.0,rho=7.0"
    ways = [{"sampler": "deis:order=3", "scheduler": scheduler, "steps": n, "length": 0.1 * n} for n in (4, 40)]
    found = [Candidate(way, 11, 125.0, 64, Estimate("KD-lite0", 1.138, 1.07, 1.21), burnt=True) for way in ways]
    compare._table(found, [], None)
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    assert all(text in printed for text in ("KD-lite0", "1.070 to 1.210", "2m05s", "burnt"))


@pytest.mark.parametrize("size", ["0", "\u00b2", "x", "99999999"])
def test_a_size_of_the_terminal_that_is_none_is_passed_over(size: str) -> None:
    done = shell("$DK plugins list schedulers", COLUMNS=size, LINES=size, TERMINAL_WIDTH=size)
    assert "karras" in done.stdout and done.stdout.splitlines()[-1] == "0", done.stderr
