"""Functions of torch that are slow on a CPU, in the place of which networks get others while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from diffkit.engine import attention, normalize

FASTER: dict[str, Any] = {
    "scaled_dot_product_attention": attention.attend,
    "normalize": normalize.normalize,
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
