"""The process that decodes: jobs on standard input, answers on standard output, one after the other.

A job is a line of JSON; so is an answer, followed by the pixels. It imports Pillow and numpy, never torch. It ends when
its standard input does: when the process that started it is gone, however that came about.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from pathlib import Path
from typing import IO, Any

from diffkit.datasets.archive import Member
from diffkit.datasets.imagefile import RejectedImage
from diffkit.engine.decoding import Decoded, Frame, decode, looks_gray

READY = b"ready\n"


def main() -> None:
    """Arguments: bytes of memory that this process may hold, seconds of computing that one image may take."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libtiff and others print their remarks
    _end_with_parent()
    _limit_memory(memory)
    try:
        answers.write(READY)
        answers.flush()
        os.dup2(1, 2)
        for line in sys.stdin.buffer:
            _limit_computing(seconds)
            _answer(answers, json.loads(line), f"too large: decoding it takes more than {memory >> 20} MiB of memory")
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # whoever asked is gone


def job_of(image: Path | Member, frame: Frame | None) -> bytes:
    """The line that asks for an image: its pixels, or, without a frame, only whether it looks gray."""
    where = image.to_dict() if isinstance(image, Member) else {"file": str(image)}
    return json.dumps({"image": where, "frame": None if frame is None else vars(frame)}).encode() + b"\n"


def read_answer(stream: IO[bytes]) -> Decoded | bool:
    """What the process found. Raises RejectedImage if it could not use the image, EOFError if it is gone."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    found: dict[str, Any] = json.loads(line)
    if "rejected" in found:
        raise RejectedImage(found["rejected"])
    if "shape" not in found:
        return bool(found["gray"])
    import numpy as np

    shape = found.pop("shape")
    size = shape[0] * shape[1] * shape[2]
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return Decoded(np.frombuffer(data, np.uint8).reshape(shape), **found)


def _answer(answers: IO[bytes], job: dict[str, Any], too_large: str) -> None:
    where = job["image"]
    pixels: Any = b""
    try:
        image = Path(where["file"]) if "file" in where else Member.from_dict(where)
        if job["frame"] is None:
            found: dict[str, Any] = {"gray": looks_gray(image)}
        else:
            frame = {**job["frame"], "background": tuple(job["frame"]["background"])}
            found = decode(image, Frame(**frame))._asdict()
            pixels = found.pop("pixels")
            found["shape"] = pixels.shape
            pixels = memoryview(pixels if pixels.flags.c_contiguous else pixels.copy())
    except RejectedImage as error:
        found = {"rejected": too_large if isinstance(error.__cause__, MemoryError) else error.reason}
    except MemoryError:
        found = {"rejected": too_large}
    answers.write(json.dumps(found).encode() + b"\n")
    answers.write(pixels)
    answers.flush()


def _end_with_parent() -> None:
    """End at once when standard input is closed at its other end, whatever is being decoded."""
    if sys.platform == "win32":
        return

    def watch() -> None:
        closed = select.poll()
        closed.register(0, 0)  # no event but the end
        closed.poll()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(memory: int) -> None:
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(
            resource.RLIMIT_DATA, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard)
        )
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_computing(seconds: int) -> None:
    """From now on; the system ends the process that takes longer."""
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        soft = int(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
