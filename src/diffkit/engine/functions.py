"""Functions of torch that are slow on a CPU, in the place of which networks get others while they are trained."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkit.engine import attention, normalize


def _untransformed(own: Callable[..., Tensor], torchs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`own`, but under `torch.func`, whose transforms do not know functions with gradients of their own."""

    @wraps(own)
    def chosen(*args: Any, **kwargs: Any) -> Tensor:
        return (torchs if torch._C._are_functorch_transforms_active() else own)(*args, **kwargs)

    return chosen


FASTER = {
    "scaled_dot_product_attention": _untransformed(attention.attend, attention.torchs),
    "normalize": _untransformed(normalize.normalize, normalize.torchs),
}


_lock = threading.Lock()
_before: list[dict[str, Callable[..., Tensor]]] = []
"""torch's own, once for each context that is entered: of several threads the last one to leave puts them back."""


@contextmanager
def fast_functions(device: torch.device) -> Iterator[None]:
    """Networks that call these functions of `torch.nn.functional` get what is fastest on this device.

    Gradients have to be found within, too: blocks that `torch.utils.checkpoint` computes again there must do so in the
    same way. (So the functions are replaced in torch's module; a mode that overrides functions is off while gradients
    are found.)
    """
    if device.type != "cpu":
        yield
        return
    with _lock:
        _before.append(_before[0] if _before else {name: getattr(F, name) for name in FASTER})
        _replace(FASTER)
    try:
        yield
    finally:
        with _lock:
            before = _before.pop()
            if not _before:
                _replace(before)


def _replace(functions: Mapping[str, Callable[..., Tensor]]) -> None:
    for name, function in functions.items():
        setattr(F, name, function)
