"""Many small files written beside other work, each of them whole, at the cost of few waits for the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

from diffkit import durable

WRITERS = 4
Writing: TypeAlias = "dict[Path, Future[Path]]"


class Publisher:
    """Encodes and writes files in threads, and publishes them in groups: whenever one is done, all written since.

    So there are as many waits for the disk as fit into the time, however many files there are. To be used as a context,
    whose end publishes what is left, even after an error: what has been written is sound. `published` is called with
    each group's paths, in the order of `put`, once they are durable.
    """

    def __init__(self, published: Callable[[Sequence[Path]], None]) -> None:
        self._published = published
        self._writers, self._publisher = ThreadPoolExecutor(WRITERS, "writer"), ThreadPoolExecutor(1, "publisher")
        self._writing: Writing = {}
        self._group: Future[None] | None = None

    def put(self, files: Mapping[Path, Callable[[], bytes]]) -> None:
        """Begin to write files, whose contents are made by the threads; waits until those put before are written.

        Raises what kept an earlier one from being written or published.
        """
        for written in self._writing.values():
            written.result()
        self._writing |= {path: self._writers.submit(_write, path, content) for path, content in files.items()}
        if self._group is None or self._group.done():
            self._next_group()

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        first: BaseException | None = error
        try:
            while self._writing or self._group is not None:
                try:
                    self._next_group()
                except Exception as failed:
                    first = first or failed
        finally:
            self._writers.shutdown()
            self._publisher.shutdown()
            durable.discard(each.result() for each in self._writing.values() if each.exception() is None)
        if first is not None and error is None:
            raise first

    def _next_group(self) -> None:
        """Wait for the last group, and begin to publish what has been put since."""
        if self._group is not None:
            group, self._group = self._group, None
            group.result()
        if self._writing:
            writing, self._writing = self._writing, {}
            self._group = self._publisher.submit(self._publish, writing)

    def _publish(self, writing: Writing) -> None:
        failed = [error for each in writing.values() if (error := each.exception()) is not None]
        written = {path: each.result() for path, each in writing.items() if each.exception() is None}
        if written:
            durable.publish(written)
            self._published(list(written))
        if failed:
            raise failed[0]


def _write(path: Path, content: Callable[[], bytes]) -> Path:
    return durable.write_aside(path, content())
