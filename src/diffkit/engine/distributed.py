"""Several processes as one: each takes its share of every batch, and what they find is added up.

A launcher starts the processes (`--gpus`, torchrun, Slurm); here is all that they say to each other.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from diffkit.engine.peers import OtherFailed, Peers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch._C._distributed_c10d import Store, Work

Item = TypeVar("Item")

JOINING = timedelta(minutes=10)
LONGEST = timedelta(hours=1)
"""How long one process may compute while the others wait for it."""
MESSAGE = 2**24  # numbers
LAUNCHER = "DIFFKIT_LAUNCHER"
"""The environment variable with the process that has started the others, where that was `--gpus`."""
STORE = "DIFFKIT_STORE"
"""The environment variable with the first process's socket for the common store, listening already."""


@dataclass(frozen=True)
class World:
    """The processes of one training: this one's number, and how many there are. Alone, every method does nothing.

    All processes call the same methods in the same order. Those that wait for the others raise OtherFailed when one
    of these has failed or hangs.
    """

    rank: int = 0
    size: int = 1
    peers: Peers | None = field(default=None, repr=False, compare=False)

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

        for some in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in some])
            self.begin_sum(flat)()
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        """Begin to replace `values` by their sum over the processes; what is returned, called, waits for that.

        On a GPU it is the GPU that waits, before what is queued next: who fails is found out by the next flag.
        """
        import torch.distributed as dist

        return self._begun(lambda: dist.all_reduce(values, async_op=True), values.device)

    def add_in_order(self, own: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The sum of the lists of tensors of all processes, in the order of ranks and, of each, of its lists.

        The same lists give the same bits, however many processes they are spread over: `own` is as long in all.
        """
        import torch

        total: list[Tensor] = []
        for rank in range(self.size):
            for tensors in own:
                piece = list(tensors) if rank == self.rank else [torch.empty_like(tensor) for tensor in tensors]
                self._send(piece, rank)
                if total:
                    for tensor, more in zip(total, piece, strict=True):
                        tensor += more
                else:
                    total = [tensor.clone() for tensor in piece]
        return total

    def _send(self, tensors: Sequence[Tensor], source: int) -> None:
        """Those of process `source` to all, in place."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for some in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in some])
            self._begun(partial(dist.broadcast, flat, source, async_op=True), flat.device)()
            for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process. Never waits for a GPU."""
        if self.size == 1:
            return flag
        import torch

        count = torch.tensor([flag], dtype=torch.int32)
        self.begin_sum(count)()
        return bool(count.item())

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def computing(self) -> AbstractContextManager[None]:
        """Inside, this process computes: waiting for a disk or a network would be a fault (see `peers`)."""
        return self.peers.computing() if self.peers else nullcontext()

    def computed(self, work: Iterator[Item]) -> Iterator[Item]:
        """The items of `work`; each but the first, which may have to compile, is made `computing`."""
        for number in itertools.count():
            with self.computing() if number else nullcontext():
                item = next(work, None)
            if item is None:
                return
            yield item

    def _begun(self, begin: Callable[[], Work | None], device: torch.device) -> Callable[[], None]:
        """Begin a message to all; what is returned waits for it."""
        assert self.peers is not None
        if device.type != "cpu":
            return partial(_wait, self.peers.queue(begin))
        work = begin()
        assert work is not None
        return partial(self.peers.wait, work)


ALONE = World()


def _wait(work: Work) -> None:
    work.wait()  # of a message between GPUs: what is queued from now on waits for it, and nobody else


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """One after another, in lists of some megabytes: large messages, but no second copy of everything."""
    some, numbers = list["Tensor"](), 0
    for tensor in tensors:
        some.append(tensor)
        numbers += tensor.numel()
        if numbers >= MESSAGE:
            yield some
            some, numbers = [], 0
    if some:
        yield some


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world that a launcher has put this process into, or one of its own. `device`: as on the command line.

    An error that leaves it ends the other processes too, and the first of several speaks for all (`personal`).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    from diffkit.engine.devices import is_memory

    gpus = device in {"auto", "cuda"} and torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = _store(rank, size)
        peers = Peers(dist.PrefixStore("diffkit", store), rank, size)  # type: ignore[attr-defined]
        # Messages between CPUs go over gloo whatever the device, so that a flag never waits for a GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LONGEST)
    except RuntimeError as error:
        if is_memory(error):
            raise
        raise _not_met(rank, size, error) from error
    try:
        yield World(rank, size, peers)
    except OtherFailed:
        raise
    except Exception as error:
        first = peers.fails()
        error.personal, error.silent = first, not first  # type: ignore[attr-defined]
        raise
    else:
        dist.destroy_process_group()  # would wait, in the other cases, for those that do not come
    finally:
        peers.close()


def _not_met(rank: int, size: int, error: RuntimeError) -> OtherFailed:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    failed = OtherFailed(
        f"Rank {rank} of {size} could not meet the others at {where}: {reason}",
        "Another process has ended while they began, or there is no connection to that address.",
    )
    failed.silent = LAUNCHER in os.environ  # by a launcher that says which process has ended
    failed.personal = not failed.silent
    return failed


def _store(rank: int, size: int) -> Store:
    """Where the processes find each other."""
    from torch.distributed import TCPStore, rendezvous  # type: ignore[attr-defined]

    if STORE in os.environ and rank == 0:
        address, port, socket = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ[STORE])
        return TCPStore(address, port, size, True, JOINING, wait_for_workers=False, master_listen_fd=socket)
    store: Store
    store, *_ = next(rendezvous("env://", rank, size, timeout=JOINING))
    return store
