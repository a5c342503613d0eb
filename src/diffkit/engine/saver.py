"""Checkpoints copied and written beside the training, which goes on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor

from diffkit.engine.checkpoint import Checkpoint
from diffkit.engine.threads import beside


class Saver:
    """Copies a state to memory of its own and writes it in a thread, one at a time.

    A thread is enough: copying, hashing, writing and syncing are calls that release Python's lock (see
    `diffkit.engine.modelfile.write_tensors`), so that the training's next step is not held up.
    """

    def __init__(self) -> None:
        self._thread = beside("saver")
        self._copies: dict[str, Tensor] = {}
        self._reserved: Future[None] | None = None
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

        The last one has to be finished. Of a state on the CPU, what is `trained` is copied in the thread and must not
        change before `copied`; buffers, which a forward pass may change, are copied at once. On a GPU all copies are
        queued before whatever comes next.
        """
        if self._reserved is not None:
            self._reserved.result()
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
            write(replace(checkpoint, tensors=copies))

        return self._thread.submit(finish)

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
