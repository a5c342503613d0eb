"""Checkpoints, models and snapshots copied and written beside the training, which goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffkit.engine.checkpoint import Checkpoint
from diffkit.engine.threads import beside


class Saver:
    """Copies a state, or a part of one, to memory of its own and writes it in a thread, one at a time and in order.

    A thread is enough: copying, hashing, writing and syncing are calls that release Python's lock (see
    `diffkit.engine.modelfile.write_tensors`), so that the training's next step is not held up.
    """

    def __init__(self) -> None:
        self._thread = beside("saver")
        self._copies: dict[str, Tensor] = {}
        self._reserved: Future[None] | None = None
        self._last: Future[None] | None = None
        self._kept: Future[None] | None = None
        self._again: Callable[[], None] | None = None
        self._copied = threading.Event()
        self._copied.set()

    def reserve(self, checkpoint: Checkpoint) -> None:
        """Get the memory ready, in the thread: the first touch of it takes longer than a copy."""

        def touch() -> None:
            for name, tensor in checkpoint.tensors.items():
                self._copy_of(name, tensor).zero_()

        self._reserved = self._thread.submit(touch)

    def begin(self, checkpoint: Checkpoint, write: Callable[[Checkpoint], None]) -> Future[None]:
        """Copy, and have `write` called with the copy; the result is there when that is done, or has failed.

        Waits for the one before, whose memory the copy takes, and raises what `check` would: nothing is written after
        what could not be. Of a state on the CPU, what is `trained` is copied in the thread and must not change before
        `copied`; buffers, which a forward pass may change, are copied at once. On a GPU all copies are queued before
        whatever comes next.
        """
        if self._reserved is not None:
            self._reserved.result()
        if self._last is not None:
            wait([self._last])
        self.check()
        self._again = None
        copies = {name: self._copy_of(name, tensor) for name, tensor in checkpoint.tensors.items()}

        def copy(names: Iterable[str]) -> None:
            for name in names:
                tensor = checkpoint.tensors[name]
                copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)

        device, event = next(iter(checkpoint.tensors.values())).device, None
        late = checkpoint.trained if device.type == "cpu" else frozenset[str]()
        copy(copies.keys() - late)
        self._copied.clear()
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))

        def finish() -> None:
            try:
                copy(late)
            finally:
                self._copied.set()
            if event is not None:
                event.synchronize()
            self._again = partial(write, replace(checkpoint, tensors=copies))
            self._again()

        self._last = self._thread.submit(finish)
        return self._last

    def keep(self, checkpoint: Checkpoint, write: Callable[[Checkpoint], None]) -> Future[None]:
        """`begin`, where nobody asks for the result: `check` raises what kept it from being written."""
        self._kept = self.begin(checkpoint, write)
        return self._kept

    def check(self) -> None:
        """Raise what kept the last of `keep` from being written, if that is known by now."""
        if self._kept is not None and self._kept.done():
            self._kept.result()

    def retry(self) -> None:
        """Until nothing is being written; what the last of `keep` could not write is tried again, from its copy."""
        self.wait()
        if self._kept is not None and self._kept.exception() is not None and self._again is not None:
            self._kept = self._thread.submit(self._again)
        if self._kept is not None:
            self._kept.result()

    def copied(self) -> None:
        """Until what `begin` was given may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Until nothing is being written, whatever became of it."""
        self._thread.submit(lambda: None).result()

    def _copy_of(self, name: str, tensor: Tensor) -> Tensor:
        """Of the same layout, in page-locked memory if it comes from a GPU."""
        kept = self._copies.get(name)
        if kept is None or kept.shape != tensor.shape or kept.stride() != tensor.stride():
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._copies[name] = kept
        return kept
