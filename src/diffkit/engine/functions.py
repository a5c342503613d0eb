"""Functions of torch that are slow on a CPU, in the place of which networks get others while they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def fast_functions(device: torch.device) -> Iterator[None]:
    """Networks that call these functions of `torch.nn.functional` get what is fastest on this device.

    Gradients have to be found within, too: blocks that `torch.utils.checkpoint` computes again there must do so in the
    same way. (So the functions are replaced in torch's module; a mode that overrides functions is off while gradients
    are found.)
    """
    before = {name: getattr(F, name) for name in FASTER}
    if device.type == "cpu":
        for name, function in FASTER.items():
            setattr(F, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)
