"""CUDA graphs without CUDA: operations are noted as they run, and run again on the same memory, without any Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffkit.engine.graphs import Graph

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def tensors(values: Any) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class Tape(TorchDispatchMode):
    """As a capture does: what asks for a value is refused, and results stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., Any], Any, dict[str, Any], list[Tensor]]] = []
        self.replays = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._schema.is_mutable:
            self.noted.append((function, args, kwargs, []))
        else:
            memory = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
            found = tensors(result)
            if not any(each.untyped_storage().data_ptr() in memory for each in found):  # no view
                self.noted.append((function, args, kwargs, found))
        return result

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, places in self.noted:
                found = tensors(function(*args, **kwargs))
                for place, value in zip(places, found, strict=False):
                    place.copy_(value)


def record(work: Callable[..., tuple[Tensor, ...]], like: Sequence[Tensor], device: torch.device) -> Graph:
    """In place of `diffkit.engine.graphs.record`."""
    with torch.inference_mode(False):
        inputs = tuple(torch.zeros_like(each, device=device) for each in like)
    work(*inputs)
    with Tape() as tape:
        outputs = work(*inputs)
    return Graph(inputs, outputs, tape.replay)
