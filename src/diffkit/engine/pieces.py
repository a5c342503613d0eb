"""Work in pieces that the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from diffkit.engine.devices import is_memory, release_memory

Item = TypeVar("Item")


@dataclass
class Pieces:
    """How many images are computed at once: `most`, and half as many from then on where the memory does not hold them.

    For passes without gradients: what is computed of an image does not depend on its company.
    """

    most: int

    def __call__(self, work: Callable[[slice], Item], count: int) -> Iterator[Item]:
        """What `work` returns for successive slices of `count` images.

        A slice that runs out of memory is tried again in halves. Raises what `work` does, of a single image also that.
        """
        start = 0
        while start < count:
            stop = min(start + self.most, count)
            try:
                found = work(slice(start, stop))
            except (RuntimeError, MemoryError) as error:
                if stop - start == 1 or not is_memory(error):
                    raise
            else:
                yield found
                start = stop
                continue
            release_memory()  # after the error is gone
            self.most = (stop - start + 1) // 2
