"""`--gpus N`: the same command once for each GPU, watched over by the process that was started.

The processes find each other as torchrun's do (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). When one fails or is
stopped, all end within 30 seconds; when the launcher is killed, they notice and end too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from diffkit.cli.signals import ONE_SIGNAL
from diffkit.engine.distributed import LAUNCHER, STORE
from diffkit.engine.processors import free_memory, processors, set_default
from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from subprocess import Popen
    from types import FrameType

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
POLL = 0.1
STOPPED, TO_FOLLOW, TO_DESERT, TO_SAVE = 10.0, 15.0, 6.0, 25.0
"""Seconds that a process may be stopped (SIGSTOP); that the others have to end after one has failed; the same after one
that has waited for another in vain; and that a process has to save when its launcher is gone."""
SMALLEST = 2**29
"""Bytes of memory of a process that trains the smallest of networks."""


def launched() -> bool:
    """Whether torchrun, or `launch`, has started this process as one of several."""
    return "WORLD_SIZE" in os.environ


def launch(count: int, device: str, *, resumable: bool = False) -> NoReturn:
    """Run this command in `count` processes and end with their exit code. Raises DiffkitError for too many.

    `resumable`: the same command goes on after a process was lost, so that the exit code is then 75 instead of 4.
    """
    _check(count, device)
    set_default("TORCH_CPP_LOG_LEVEL", "ERROR")  # or each that lives longer prints a trace for each that has ended
    if device == "cpu":
        set_default("OMP_NUM_THREADS", str(max(1, processors() // count)))
    command = [sys.executable, "-m", "diffkit", *sys.argv[1:]]
    sys.exit(Launcher(command, count, ExitCode.RESUMABLE if resumable else ExitCode.MACHINE).run())


def watch_launcher() -> None:
    """In a process that a launcher has started: when the launcher is gone, stop as if asked to, and then for sure."""
    if LAUNCHER in os.environ:
        launcher = int(os.environ[LAUNCHER])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
    else:
        return

    import threading

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(TO_SAVE)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def leave(code: int) -> None:
    """End now, if this is one of several processes and has failed: Python would wait for what others never answer."""
    if launched() and code:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _check(count: int, device: str) -> None:
    """Raises DiffkitError unless this machine can run so many processes."""
    if device not in {"auto", "cuda", "cpu"}:
        raise DiffkitError(f"--gpus {count} gives each process a device of its own.", f"Leave --device {device} out.")
    if device == "cpu":
        free, fits = free_memory(), processors()
        there = f"{fits} processors"
        if free is not None and free // SMALLEST < fits:
            fits = free // SMALLEST
            there = f"memory for {fits} such processes, of at least {SMALLEST // 2**20} MiB each"
        without = "Leave --gpus out."
    else:
        import torch

        fits = torch.cuda.device_count()
        there = f"{fits} that torch {torch.__version__} can use"
        without = "Leave --gpus out, or add --device cpu for as many CPU processes."
    if count > fits:
        hint = f"Choose --gpus {fits}." if fits > 1 else without
        raise DiffkitError(f"--gpus {count}: this machine has {there}.", hint, code=ExitCode.MACHINE)


class Launcher:
    """Starts a command `count` times, passes signals on and sees to it that all end together.

    `lost`: the exit code when a process is killed, stopped or hangs, none of which it could say itself.
    """

    def __init__(self, command: list[str], count: int, lost: ExitCode) -> None:
        self.command, self.count, self.lost = command, count, lost
        self.asked: float | None = None  # when a signal asked to stop
        self.processes: list[Popen[bytes]] = []
        self.ended: list[int] = []  # ranks, the first to end first
        self.killed: set[int] = set()
        self.stopped: list[int] = []  # those killed because a signal had stopped them
        self.halted = [0.0] * count  # seconds that each has been stopped; what passed unwatched is not counted
        self.deadline: float | None = None

    def run(self) -> int:
        """Wait for all; returns the command's exit code."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            self._start()
            while len(self.ended) < len(self.processes):
                time.sleep(POLL)
                self._look()
        finally:
            self._kill(range(len(self.processes)))
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code()

    def _start(self) -> None:
        """The first process is handed a socket for the store where they meet, so that nobody else takes its port."""
        import socket
        import subprocess

        with socket.socket() as meeting:
            meeting.bind(("127.0.0.1", 0))
            meeting.listen(self.count + 16)
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting.getsockname()[1]}
            for rank in range(self.count):
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.count, "LOCAL_WORLD_SIZE": self.count}
                own |= {LAUNCHER: os.getpid(), **address}
                inherited = [meeting.fileno()] if rank == 0 and os.name == "posix" else []
                if inherited:
                    own[STORE] = inherited[0]
                environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
                if self.asked is not None:
                    return
                self.processes.append(
                    subprocess.Popen(self.command, env=environment, pass_fds=inherited, start_new_session=True)
                )
                if self.asked is not None:  # the signal came before there was a process to pass it on to
                    self._kill([rank])
                    return

    def _look(self) -> None:
        for rank, process in enumerate(self.processes):
            if rank in self.ended:
                continue
            code = process.poll()
            if code is None:
                self.halted[rank] = self.halted[rank] + POLL if _is_stopped(process) else 0.0
                if self.halted[rank] > STOPPED and rank not in self.killed:
                    self.stopped.append(rank)
                    self._kill([rank])
                continue
            self.ended.append(rank)
            if self.deadline is None and code not in (ExitCode.OK, ExitCode.RESUMABLE):
                self.deadline = time.monotonic() + (TO_DESERT if code == ExitCode.OTHER_FAILED else TO_FOLLOW)
        if self.deadline is not None and time.monotonic() > self.deadline:
            self._kill(range(len(self.processes)))

    def _kill(self, ranks: Iterable[int]) -> None:
        for rank in ranks:
            if self.processes[rank].poll() is None:
                self.killed.add(rank)
                self.processes[rank].kill()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """The first signal goes to all processes; the second ends them at once."""
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            for process in self.processes:
                process.send_signal(number)
        elif now - self.asked > ONE_SIGNAL:
            self._kill(range(len(self.processes)))
            os._exit(int(ExitCode.INTERRUPTED))

    def _code(self) -> int:
        """The exit code of the command, from those of the processes; prints what a lost process could not."""
        codes = [process.returncode for process in self.processes]
        if self.asked is not None and (not codes or codes[0] != ExitCode.OTHER_FAILED):
            return codes[0] if codes and codes[0] >= 0 else int(ExitCode.INTERRUPTED)
        well = (ExitCode.OK, ExitCode.RESUMABLE)
        if all(code in well for code in codes):
            return codes[0]
        followers = (*well, ExitCode.OTHER_FAILED)
        first = next((rank for rank in self.ended if codes[rank] not in followers and rank not in self.killed), None)
        if self.stopped:
            self._say_lost(self.stopped[0], f"has been stopped by a signal for {STOPPED:.0f} seconds")
        elif first is not None and codes[first] < 0:
            self._say_lost(first, f"was ended by {signal.Signals(-codes[first]).name}")
        elif first is not None:
            # What is wrong with the command or the data, the first process has said for all.
            explained = first == 0 and codes[first] != ExitCode.BUG
            if not explained and any(code != codes[first] for code in codes):
                self._say(first, f"failed with exit code {codes[first]}")
            return codes[first]
        elif early := [rank for rank in self.ended if codes[rank] in well]:
            self._say_lost(early[0], "ended before the others")
        return int(self.lost)  # if nothing was said here, a process that waited in vain for another has said so

    def _say_lost(self, rank: int, what: str) -> None:
        self._say(rank, what, "Run the same command again to go on." if self.lost == ExitCode.RESUMABLE else "")

    def _say(self, rank: int, what: str, hint: str = "") -> None:
        from diffkit.cli.console import say

        say(f"[bold red]Error:[/] Rank {rank} of {self.count} {what}, and so all processes have ended.")
        if hint:
            say(hint)


def _is_stopped(process: Popen[bytes]) -> bool:
    """Whether a signal has stopped it, as SIGSTOP does."""
    if not hasattr(os, "waitid"):
        return False
    try:
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False
