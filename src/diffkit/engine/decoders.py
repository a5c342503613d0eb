"""Image files decoded in processes of their own, so that a file can cost neither the work nor the machine.

Each process may hold a bounded amount of memory and compute for a bounded time on one file. A file that goes beyond, or
that crashes the decoder, costs its process, which is replaced; for the caller it is one more rejected image.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from diffkit.datasets.archive import Member
from diffkit.datasets.imagefile import RejectedImage
from diffkit.engine import decoder_process, decoding
from diffkit.engine.decoding import Answer, Decoded, Frame
from diffkit.engine.processors import processors
from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from diffkit.interfaces import ImageLike

MEMORY = 480 * 2**20
BYTES_PER_PIXEL = 16
SECONDS = 10
PATIENCE = 30
"""Bytes of memory for any image, more for each pixel of the result; seconds of computing for one image; seconds until
an answer has to be there, which a slow disk or a busy machine may delay."""

TURN = 0.02
MOST = 32

Request: TypeAlias = "tuple[ImageLike, Frame | None]"
"""An image and how to decode it; without a frame, only whether it says that it is gray."""


class Decoders:
    """Threads that each get what they need decoded; a context manager that ends them and their processes.

    workers: how many at once, 0 = one per processor. pixels: of the largest result. Image files and members of archives
    are decoded in processes, which are started when they are first needed; arrays, Pillow images and functions of
    dataset sources are handled in the threads.
    """

    def __init__(self, workers: int = 0, pixels: int = 0) -> None:
        self.workers = workers or processors()
        self._memory = MEMORY + BYTES_PER_PIXEL * pixels
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="diffkit-decode")
        self._processes = _Processes()
        self._end = weakref.finalize(self, _close, self._threads, self._processes)

    def __enter__(self) -> Decoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def decode_all(self, requests: Iterable[Request]) -> Iterator[Answer]:
        """An answer for each request, in order; a bounded number of them is under way at any time.

        Threads take as many requests at a time as keep them busy for `TURN` seconds.
        """
        source, size = iter(requests), 1
        under_way: deque[Future[tuple[list[Answer], float]]] = deque()
        more = True
        while more or under_way:
            while more and len(under_way) <= 4 * self.workers:
                turn = list(islice(source, size))
                more = bool(turn)
                if turn:
                    under_way.append(self._threads.submit(self._take_turn, turn))
            if under_way:
                answers, seconds = under_way.popleft().result()
                size = max(1, min(MOST, int(TURN / max(seconds / len(answers), 1e-6))))
                yield from answers

    def decode(self, image: ImageLike, frame: Frame) -> Decoded:
        """One image to its pixels. Raises RejectedImage."""
        (answer,) = self.decode_all([(image, frame)])
        if isinstance(answer, RejectedImage):
            raise answer
        assert isinstance(answer, Decoded)
        return answer

    def _take_turn(self, requests: list[Request]) -> tuple[list[Answer], float]:
        """In a thread: the answers, and how long they took."""
        start = time.perf_counter()
        jobs = [decoder_process.job_of(image, frame) for image, frame in requests if isinstance(image, (Path, Member))]
        processed = iter(self._processed(jobs))
        answers = [
            next(processed) if isinstance(image, (Path, Member)) else decoding.answer(image, frame)
            for image, frame in requests
        ]
        return answers, time.perf_counter() - start

    def _processed(self, jobs: list[bytes]) -> list[Answer]:
        """A crash may have come from outside, so each image gets a second try, in a new process."""
        answers: list[Answer] = []
        crashed = -1  # the last image that the decoder crashed on
        while len(answers) < len(jobs):
            process = self._processes.take(self._memory)
            try:
                for answer in process.ask(jobs[len(answers) :]):
                    answers.append(answer)
            except _Crash as crash:
                if crashed == len(answers):
                    answers.append(RejectedImage(str(crash)))
                else:
                    crashed = len(answers)
            except BaseException:
                process.kill()  # what it still answers is not of the next job
                process.end()
                raise
            finally:
                self._processes.put_back(process)
        return answers


class _Crash(Exception):
    """The process ended by itself, without an answer; the text says how."""


class _Process:
    """One decoder process; `ask` it one thing at a time."""

    def __init__(self, memory: int) -> None:
        # With our `sys.path`: the same modules as here.
        code = f"import sys; sys.path[:] = {sys.path!r}; from diffkit.engine.decoder_process import main; main()"
        command = [sys.executable, "-c", code, str(memory), str(SECONDS)]
        # Arithmetic libraries would reserve memory for each core; a session of its own keeps Ctrl-C away.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, bufsize=0, stdin=pipe, stdout=pipe, env=environment, start_new_session=True
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._jobs, self._answers = self._process.stdin, self._process.stdout
        self._waiting = None
        if sys.platform != "win32":
            self._waiting = select.poll()
            self._waiting.register(self._answers, select.POLLIN)

    def check_started(self) -> None:
        """Wait until it is ready. Raises DiffkitError if it cannot start."""
        try:
            decoder_process.read_exactly(self._answers, len(decoder_process.READY))
        except EOFError:
            raise DiffkitError(
                f"A process for decoding images could not be started (exit status {self.end()}).",
                "Free some memory, or use fewer processes: --workers 1.",
                code=ExitCode.MACHINE,
            ) from None

    def ask(self, jobs: Sequence[bytes]) -> Iterator[Answer]:
        """Answers in order; the next job lies ready while one is at work.

        Ends early, as the process does, with an image that takes too long. Raises _Crash.
        """
        sent = 0
        for done in range(len(jobs)):
            try:
                for job in jobs[sent : done + 2]:
                    self._send(job)
                    sent += 1
                if not self._answered():
                    self.kill()
                    self.end()
                    yield RejectedImage(f"no answer: reading it takes more than {PATIENCE} s")
                    return
                answer = decoder_process.read_answer(self._answers)
            except (EOFError, OSError, ValueError) as error:
                status = self.end()
                if hasattr(signal, "SIGXCPU") and status == -signal.SIGXCPU:
                    yield RejectedImage(f"too much work: decoding it takes more than {SECONDS} s")
                    return
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                raise _Crash(f"the decoder crashed on it: {how}") from error
            yield answer

    @property
    def running(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End it from any thread; who waits for its answer gets none."""
        self._process.kill()

    def end(self) -> int:
        """Wait until it is gone, for a second if it is ending by itself, and return its exit status."""
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
        status = self._process.wait()
        for stream in (self._jobs, self._answers):
            with suppress(OSError):  # what was not sent is of no use to anyone
                stream.close()
        return status

    def _send(self, job: bytes) -> None:
        while job:
            job = job[self._jobs.write(job) :]

    def _answered(self) -> bool:
        """Whether an answer begins within `PATIENCE`. (Where pipes cannot be waited for, there is no such limit.)"""
        return self._waiting is None or bool(self._waiting.poll(PATIENCE * 1000))


class _Processes:
    """Those that run: idle ones are handed out again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._closed = False

    def take(self, memory: int) -> _Process:
        """An idle process, or a new one. Raises DiffkitError if it cannot start."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoders have been closed")
            new = not self._idle
            process = _Process(memory) if new else self._idle.pop()
            self._busy.add(process)
        if new:
            process.check_started()
        return process

    def put_back(self, process: _Process) -> None:
        """For the next job, if it still runs."""
        with self._lock:
            self._busy.discard(process)
            if process.running and not self._closed:
                self._idle.append(process)
                return
        process.kill()
        process.end()

    def close(self) -> None:
        """End all; those at work are waited for by the threads that asked them."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in [*idle, *self._busy]:
                process.kill()
        for process in idle:
            process.end()


def _close(threads: ThreadPoolExecutor, processes: _Processes) -> None:
    processes.close()
    threads.shutdown(wait=True, cancel_futures=True)
