"""A thread beside the training, which leaves the processors to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def beside(name: str) -> ThreadPoolExecutor:
    """One thread, whose operations torch does not share out among others.

    Otherwise the first large one starts a second team of OpenMP threads. From then on the process has more of them
    than there are processors, and a training step takes up to a quarter longer: presumably since threads that are too
    many no longer wait for each other awake.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, name)
    pool.submit(_alone).result()
    torch.set_num_threads(threads)  # for threads of others: what is set in one is where those begin that come later
    return pool


def _alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # settles it: a thread's first question takes over what was set last in any
