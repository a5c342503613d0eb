"""Several processes as one: each takes its share of every batch, and what they find is added up.

torchrun starts the processes and watches over them; here is all that they say to each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from diffkit.errors import DiffkitError, ExitCode

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(hours=1)
MESSAGE = 2**24  # numbers


@dataclass(frozen=True)
class World:
    """The processes of one training: this one's number, and how many there are. Alone, every method does nothing.

    All processes call the same methods in the same order.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of `count` things are this process's: all of them together, none twice."""
        return slice(-(-count * self.rank // self.size), -(-count * (self.rank + 1) // self.size))

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over the processes, in place; all of one type, in messages of some size."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for some in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in some])
            with _among_others():
                dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process. Never waits for a GPU."""
        if self.size == 1:
            return flag
        import torch
        import torch.distributed as dist

        flags = torch.tensor([flag], dtype=torch.int32)
        with _among_others():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags.item())

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)


ALONE = World()


class OtherFailed(DiffkitError):
    """Another process of this world has ended; it has said why."""

    silent = True


@contextmanager
def _among_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OtherFailed(f"Another process has ended ({error}).", code=ExitCode.MACHINE) from error


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """One after another, in lists of some megabytes: large messages, but no second copy of everything."""
    some: list[Tensor] = []
    for tensor in tensors:
        some.append(tensor)
        if sum(each.numel() for each in some) >= MESSAGE:
            yield some
            some = []
    if some:
        yield some


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that torchrun has put this process into, or one of its own. `device`: as on the command line."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    gpus = device in {"auto", "cuda"} and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Messages between CPUs go over gloo whatever the device, so that a flag never waits for a GPU's queue.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
