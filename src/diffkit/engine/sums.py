"""Gradients summed over processes while the backward pass still computes others.

As in torch's DistributedDataParallel (Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel
Training"), gradients lie in flat buffers, in the order in which a backward pass reaches them, and a buffer is sent as
soon as it is full. Two things differ. Every process sends all buffers in every step, whatever became of its pass: so
one may run out of memory, and all try again. And all waiting is done by `World`, which notices who fails or hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor

from diffkit.engine.distributed import World

MESSAGES = 8
LEAST, MOST = 2**18, 2**23
"""Numbers in a message: an eighth of all gradients, within these bounds but for a larger single one."""
ALIGNMENT = 16
"""Numbers; every gradient begins at a multiple of it, so that vectorized kernels need no special case."""


class GradientSums:
    """The sums of the gradients of `parameters` over the processes of a world. Used as a context."""

    def __init__(self, parameters: Sequence[Tensor], world: World) -> None:
        self._world = world
        self._buffers = [_Buffer(group) for group in grouped(list(parameters)[::-1])]
        self._begun: list[Callable[[], None]] = []  # of each message, what waits for it
        self._watching = False
        self._early: bool | None = None  # whether buffers are sent during a pass; None: not known yet
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._hook(buffer))
            for buffer in self._buffers
            for parameter in buffer.parameters
        ]

    def __enter__(self) -> GradientSums:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def last_pass(self) -> Iterator[None]:
        """Inside runs the backward pass that completes this process's gradients.

        In the first one it is only counted how often each gradient is added to. If one is more than once, as with
        reentrant checkpoints of shared layers, nothing is ever sent before the end of a pass.
        """
        self._watching = True
        try:
            yield
        finally:
            self._watching = False
        if self._early is None:
            self._early = all(count == 1 for buffer in self._buffers for count in buffer.visits.values())

    def finish(self, beside: Sequence[Tensor] | None, like: Sequence[Tensor] = ()) -> list[Tensor] | None:
        """Replace the gradients by their sums (zeros count for those that are None); returns the sums of `beside`.

        Called once in every step, by all processes, with float32 tensors of the same shapes. A process whose pass has
        failed gives None, and such shapes as `like`; it gets None, and the sums are of no use to any.
        """
        for buffer in self._buffers[len(self._begun) :]:
            self._send(buffer)
        given = [torch.zeros_like(each) for each in like] if beside is None else list(beside)
        flat = torch.cat([tensor.flatten() for tensor in given])
        self._begun.append(self._world.begin_sum(flat))
        for wait in self._begun:
            wait()
        self._begun = []
        for buffer in self._buffers:
            buffer.visits.clear()
        if beside is None:
            return None
        parts = flat.split([tensor.numel() for tensor in given])
        return [part.view_as(tensor) for part, tensor in zip(parts, given, strict=True)]

    def _send(self, buffer: _Buffer) -> None:
        buffer.gather()
        self._begun.append(self._world.begin_sum(buffer.flat))

    def _hook(self, buffer: _Buffer) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            if not self._watching:
                return
            buffer.visits[parameter] = buffer.visits.get(parameter, 0) + 1
            if not self._early:
                return
            if buffer in self._buffers[: len(self._begun)]:
                raise RuntimeError(
                    "A gradient was added to after it had been sent to the other processes: the network's backward "
                    "pass is not the same in every step."
                )
            for each in self._buffers[len(self._begun) :]:  # in the same order in all processes
                if len(each.visits) < len(each.parameters):
                    break
                self._send(each)

        return arrived


class _Buffer:
    """Memory for the gradients of some parameters: `flat` is sent, and each gradient is a view of it."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.visits: dict[Tensor, int] = {}  # how often a pass has added to the gradient of each
        sizes = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._views = [
            part[: parameter.numel()].as_strided(parameter.shape, torch.empty_like(parameter, device="meta").stride())
            for parameter, part in zip(parameters, self.flat.split(sizes), strict=True)
        ]

    def gather(self) -> None:
        """Move the gradients here. Each stays the gradient of its parameter, in the parameter's own layout."""
        moved: tuple[list[Tensor], list[Tensor]] = ([], [])
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad is not view:
                moved[0].append(view)
                moved[1].append(parameter.grad)
            parameter.grad = view
        if moved[0]:
            torch._foreach_copy_(*moved)


def grouped(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """One after another, in lists of one type on one device, of about as many numbers as suit a message."""
    most = min(max(sum(tensor.numel() for tensor in tensors) // MESSAGES, LEAST), MOST)
    group, numbers = list[Tensor](), 0
    for tensor in tensors:
        same = group and (group[0].dtype, group[0].device) == (tensor.dtype, tensor.device)
        if group and (not same or numbers >= most):
            yield group
            group, numbers = [], 0
        group.append(tensor)
        numbers += tensor.numel()
    if group:
        yield group
