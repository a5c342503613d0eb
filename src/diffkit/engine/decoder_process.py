"""The process that decodes: jobs on standard input, answers on standard output, one after the other.

A job is a line of JSON. An answer is the lengths of its two parts, a record in JSON, and the pixels. The process
imports Pillow and numpy, never torch. It ends when its standard input does: when the process that started it is gone,
however that came about.
"""

from __future__ import annotations

import json
import os
import select
import struct
import sys
import threading
from pathlib import Path
from typing import IO, Any

import numpy as np

from diffkit.datasets.archive import Member
from diffkit.datasets.imagefile import RejectedImage
from diffkit.engine.decoding import Answer, Decoded, Frame, decode, looks_gray

READY = b"ready\n"
_SIZES = struct.Struct("<II")


def main() -> None:
    """Arguments: bytes of memory that this process may hold, seconds of computing that one image may take."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    while (nowhere := os.open(os.devnull, os.O_WRONLY)) < 3:
        pass  # a standard descriptor that was closed must not become that of the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(nowhere, 1)  # libtiff and others print their remarks
    _end_with_parent()
    _limit_memory(memory)
    try:
        answers.write(READY)
        answers.flush()
        os.dup2(1, 2)
        for line in sys.stdin.buffer:
            _limit_computing(seconds)
            _reply(answers, json.loads(line), f"too large: decoding it takes more than {memory >> 20} MiB of memory")
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # whoever asked is gone


def job_of(image: Path | Member, frame: Frame | None) -> bytes:
    """The line that asks for an image: its pixels, or, without a frame, only whether it looks gray."""
    where = image.to_dict() if isinstance(image, Member) else {"file": str(image)}
    return json.dumps({"image": where, "frame": None if frame is None else vars(frame)}).encode() + b"\n"


def read_answer(stream: IO[bytes]) -> Answer:
    """What the process found. Raises EOFError if it is gone."""
    text, pixels = _SIZES.unpack(read_exactly(stream, _SIZES.size))
    found: dict[str, Any] = json.loads(read_exactly(stream, text))
    if "rejected" in found:
        return RejectedImage(found["rejected"])
    if "shape" not in found:
        return bool(found["gray"])
    shape = found.pop("shape")
    return Decoded(np.frombuffer(read_exactly(stream, pixels), np.uint8).reshape(shape), **found)


def read_exactly(stream: IO[bytes], size: int) -> bytearray:
    """So many bytes of an unbuffered stream, and none of what follows. Raises EOFError if it ends before."""
    found = bytearray(size)
    view = memoryview(found)
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]
    return found


def _reply(stream: IO[bytes], job: dict[str, Any], too_large: str) -> None:
    where, frame = job["image"], job["frame"]
    pixels: Any = b""
    try:
        image = Path(where["file"]) if "file" in where else Member.from_dict(where)
        if frame is None:
            reply: dict[str, Any] = {"gray": looks_gray(image)}
        else:
            reply = decode(image, Frame(**{**frame, "background": tuple(frame["background"])}))._asdict()
            pixels = reply.pop("pixels")
            reply["shape"] = pixels.shape
    except RejectedImage as error:
        reply = {"rejected": too_large if isinstance(error.__cause__, MemoryError) else error.reason}
    except MemoryError:
        reply = {"rejected": too_large}
    text = json.dumps(reply).encode()
    stream.write(_SIZES.pack(len(text), memoryview(pixels).nbytes) + text)
    stream.write(pixels)
    stream.flush()


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
