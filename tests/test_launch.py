"""`--gpus N`: what the launcher makes of processes that fail, stop, hang or are left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import diffkit
from conftest import TINY, call_diffkit, run_diffkit
from diffkit.cli import launch
from diffkit.cli.launch import Launcher
from diffkit.engine import distributed, processors
from diffkit.engine.distributed import ALONE, World
from diffkit.engine.store import Store
from diffkit.errors import ExitCode

LOST = ExitCode.RESUMABLE
WELL = "import os, sys, time; rank = int(os.environ['RANK'])\n"
FAULTY = """
import os, time
from diffkit import hookimpl

calls = 0

def sixth():
    global calls
    calls += 1
    return calls == 6 and os.environ.get("RANK") == "1"

def hangs(s, density):
    if sixth():
        time.sleep(10**6)
    return s * 0 + 1

def dies(s, density):
    # Before a sum of gradients to which the other process has sent its part.
    if sixth():
        from diffkit.engine.sums import GradientSums

        def die(self, buffer):
            time.sleep(1)
            os.kill(os.getpid(), 9)

        GradientSums._send = die
    return s * 0 + 1

@hookimpl
def weightings():
    return {"hangs": hangs, "dies": dies}
"""


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def launched(script: str, count: int = 2) -> tuple[int, Launcher]:
    """The exit code of a launcher whose processes run this script, and the launcher."""
    launcher = Launcher([sys.executable, "-S", "-c", WELL + script], count, LOST)
    return launcher.run(), launcher


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("sys.exit(0)", 0, ""),
        ("sys.exit(75)", 75, ""),
        ("sys.exit(2)", 2, ""),  # all say the same, and the first has said it
        ("sys.exit([76, 1][rank])", 1, "Rank 1 of 2 failed with exit code 1"),
        ("sys.exit([5, 76][rank])", 5, ""),  # the first has said what is wrong for all
        ("sys.exit([0, 3][rank])", 3, "Rank 1 of 2 failed with exit code 3"),
        ("rank or os.kill(os.getpid(), 9); time.sleep(0.5); sys.exit(76)", LOST, "Rank 0 of 2 was ended by SIGKILL"),
        ("rank and os._exit(0); time.sleep(0.5); sys.exit(76)", LOST, "Rank 1 of 2 ended before the others"),
    ],
)
def test_the_exit_code_is_that_of_who_failed_first_and_it_is_named(
    script: str, code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(script)[0] == code
    said = capfd.readouterr().err
    assert said.count("Error:") == bool(message) and message in said


@pytest.mark.parametrize("fault", ["sys.exit(1)", "os.kill(os.getpid(), 9)", "sys.exit(76)"])
def test_those_that_do_not_follow_a_failure_are_killed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TO_FOLLOW", 0.5)
    monkeypatch.setattr(launch, "TO_DESERT", 0.5)
    start = time.monotonic()
    code, launcher = launched(f"rank == 1 and {fault}\ntime.sleep(1000)", 3)
    assert code == (1 if fault == "sys.exit(1)" else LOST) and time.monotonic() - start < 10
    assert [process.returncode for process in launcher.processes][::2] == [-9, -9]


def test_a_signal_while_the_processes_are_started_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    start_process = subprocess.Popen

    def interrupted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = start_process(*arguments, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    start = time.monotonic()
    code, launcher = launched("time.sleep(1000)")
    assert code == ExitCode.INTERRUPTED and time.monotonic() - start < 10
    assert [process.returncode for process in launcher.processes] == [-9]


def test_data_are_verified_once_the_processes_have_met(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large data take longer than processes wait to meet; the first process of a machine reads them for all."""
    events: list[str] = []

    @contextmanager
    def joined(device: str) -> Iterator[World]:
        events.append("joined")
        yield ALONE

    monkeypatch.setattr(distributed, "joined", joined)
    monkeypatch.setattr(Store, "check", lambda store: events.append("checked"))
    for rank, expected in (("0", ["joined", "checked"]), ("1", ["joined"])):
        events.clear()
        monkeypatch.setenv("LOCAL_RANK", rank)
        done = call_diffkit("train", dataset, "-o", tmp_path / rank, "--steps", 1, "--preview-every", 0, *TINY)
        assert done.returncode == 0 and events == expected


def test_a_stopped_process_ends_all_and_a_pause_does_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "STOPPED", 1.0)
    pause = "import subprocess; pid = os.getpid(); "
    pause += "subprocess.Popen(['sh', '-c', f'sleep 0.4; kill -CONT {pid}']); os.kill(pid, 19); sys.exit(0)"
    assert launched(pause)[0] == 0
    monkeypatch.setattr(launch, "TO_FOLLOW", 0.5)
    code, launcher = launched("rank and os.kill(os.getpid(), 19); time.sleep(1000)")
    assert code == LOST and all(process.returncode == -9 for process in launcher.processes)
    assert "Rank 1 of 2 has been stopped by a signal" in capfd.readouterr().err


def launcher_process(script: str, folder: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A launcher in a process of its own, and the two that it has started, which note their numbers and go on."""
    ready = f"open(os.path.join({str(folder)!r}, str(os.getpid())), 'w').close()\n"
    body = f"from diffkit.cli import launch\nlaunch.TO_SAVE = 1\nlaunch.watch_launcher()\n{script}\n{ready}"
    command = [sys.executable, "-c", WELL + body + "time.sleep(1000)"]
    code = f"import sys; from diffkit.cli.launch import Launcher; sys.exit(Launcher({command!r}, 2, 75).run())"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert wait_for(lambda: len(list(folder.iterdir())) == 2)
    return process, [int(path.name) for path in folder.iterdir()]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at as on Linux")
@pytest.mark.parametrize("script", ["", "import signal; signal.signal(signal.SIGTERM, lambda *_: time.sleep(1000))"])
def test_a_killed_launcher_leaves_no_process(script: str, tmp_path: Path) -> None:
    process, ranks = launcher_process(script, tmp_path)
    process.kill()
    process.wait()
    assert wait_for(lambda: all(map(gone, ranks)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at as on Linux")
def test_the_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    process, ranks = launcher_process("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)", tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(launch.ONE_SIGNAL + 0.2)
    assert process.poll() is None and not any(map(gone, ranks))
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == ExitCode.INTERRUPTED and wait_for(lambda: all(map(gone, ranks)), 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [("hangs", "Rank 1 of 2 hangs"), ("dies", "Rank 1 of 2 was ended by SIGKILL")]
)
def test_one_process_that_hangs_or_dies_ends_all_and_the_run_goes_on(
    fault: str, said: str, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    installed = tmp_path / "faulty-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[diffkit]\nfaulty = faulty\n")
    command = ("train", dataset, "-o", tmp_path / "run", *TINY, "--weighting", fault, "--steps", 8)
    own = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = run_diffkit(*command, "--gpus", 2, **own, DIFFKIT_PATIENCE="2")
    assert done.returncode == ExitCode.RESUMABLE, done.stderr
    assert done.stderr.count(said) == done.stderr.count("Error:") == 1, done.stderr
    done = run_diffkit(*command, **own)
    assert done.returncode == 0 and "Done after 64 images" in done.stderr, done.stderr


@pytest.mark.parametrize("count", [0, -1, 99, 1000])
def test_more_processes_than_fit_are_refused(count: int, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "processors", lambda: 8)
    monkeypatch.setattr(launch, "free_memory", lambda: 3 * 2**30)
    monkeypatch.setattr(launch, "Launcher", None)
    done = call_diffkit("train", dataset, "--device", "cpu", "--gpus", count)
    if count < 1:
        assert done.returncode == ExitCode.USAGE
    else:
        assert done.returncode == ExitCode.MACHINE
        assert "memory for 6 such processes" in done.stderr and "Choose --gpus 6." in done.stderr


def test_control_groups_bound_processors_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "cgroup/outer/inner"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("4:cpu:/\n0::/outer/inner\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr(processors, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    assert (processors.processors(), processors.free_memory()) == (64, 8000 * 1024)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner.parent / "cpu.max").write_text("250000 100000\n")
    (inner / "memory.max").write_text("5000\n")
    (inner / "memory.current").write_text("1000\n")
    assert (processors.processors(), processors.free_memory()) == (3, 4000)


def test_openmp_is_set_up_before_torch_unless_the_user_did() -> None:
    code = "import os; from diffkit.engine.processors import set_up_openmp; set_up_openmp()\n"
    code += "import sys; assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    found = {}
    for name in ("", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
        environment |= {name: "7"} if name else {}
        command = [sys.executable, "-c", code]
        found[name] = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
    assert found == {"": processors.SPINS, "GOMP_SPINCOUNT": "7", "OMP_WAIT_POLICY": "None"}


def test_the_version_is_said_without_loading_what_it_does_not_need() -> None:
    loaded = "sorted({'torch', 'diffkit.compose'} & {*sys.modules})"
    code = f"import atexit, sys; atexit.register(lambda: print({loaded}))\n"
    code += "from diffkit.cli import main; sys.argv = ['diffkit', '--version']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"diffkit {diffkit.__version__}", "[]"]
