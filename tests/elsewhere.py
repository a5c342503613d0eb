"""A device that is not the CPU and has no float64, such as Apple's GPUs: the meta device, made to behave like one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ELSEWHERE = torch.device("meta")
aten = torch.ops.aten
TRANSFERS = (aten._to_copy, aten.to)
CARRIERS = (*TRANSFERS, aten.copy_, aten.index, aten._local_scalar_dense)


class Elsewhere(TorchDispatchMode):
    """Whatever comes back from the device is zero, a single number 1.

    Raises AssertionError for float64 there, and for operations on tensors of both devices, but for single numbers.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, operation = dict(kwargs or {}), func.overloadpacket
        inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        away = [each for each in inputs if each.device == ELSEWHERE]
        if away and operation is aten._local_scalar_dense:
            return 1.0 if away[0].dtype.is_floating_point else 1
        if away and operation in TRANSFERS and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(away[0].shape, dtype=kwargs.get("dtype") or away[0].dtype)
        if away and operation is aten.copy_ and args[0].device != ELSEWHERE:
            return args[0].zero_()
        if away and operation not in CARRIERS:
            here = [each for each in inputs if each.dim() and each.device != ELSEWHERE]
            assert not here, f"{func} is given tensors of two devices"
        result = func(*args, **kwargs)
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device == ELSEWHERE:
                assert each.dtype != torch.float64, f"{func} makes float64 where there is none"
        return result


def placed(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The module that is made, on that device."""
    with ELSEWHERE:
        return make()
