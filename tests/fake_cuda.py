"""A GPU that is not there: of what it would compute torch works out shapes, types and devices. CPUs compute as ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tape import WAITS, tensors

CUDA = torch.device("cuda", 0)
VIEWS = {"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"}


class Kernels(TorchDispatchMode):
    """Counts the operations on the GPU by name (views and empty memory are none), and notes what is slow there.

    `moved`: operations that move from device to device, by shape; `waits`: those that ask the GPU for a value; `casts`:
    of one float type to another; `doubles`: that make float64 on the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = Counter[str]()
        self.moved: list[tuple[str, tuple[int, ...]]] = []
        self.waits: list[str] = []
        self.casts: list[tuple[tuple[int, ...], torch.dtype, torch.dtype]] = []
        self.doubles: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given, found = tensors((args, kwargs)), tensors(result)
        name = function._schema.name.split("::")[1]
        there = [each for each in given + found if each.device.type == "cuda"]
        if not there:
            return result
        devices = {each.device.type for each in given if each.dim()} | {each.device.type for each in found}
        if len(devices) > 1:
            self.moved.append((name, tuple((found or given)[0].shape)))
        if function in WAITS:
            self.waits.append(name)
        self.doubles += [name for each in found if each.dtype == torch.float64 and each.device.type == "cuda"]
        if name == "_to_copy" and given[0].is_floating_point() and given[0].dtype != found[0].dtype:
            self.casts.append((tuple(given[0].shape), given[0].dtype, found[0].dtype))
        if not function.is_view and name not in VIEWS and "empty" not in name and name != "device":
            self.names[name] += 1
        return result


class OnCuda(FakeTensorMode):
    """Tensors on the GPU are fake; those on the CPU are real, so that code may look at their values."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        fake = any(isinstance(each, FakeTensor) for each in tensors((args, kwargs)))
        if not fake and (device is None or torch.device(device).type == "cpu"):
            return function(*args, **kwargs)
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, a GPU seems to be there, to autocast too. Backward passes do not work: torch asks the driver for them."""
    import torch.cuda.amp.common

    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    with OnCuda(allow_non_fake_inputs=True) as mode:
        yield mode
