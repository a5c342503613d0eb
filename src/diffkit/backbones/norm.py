"""GroupNorm with what follows it in a residual block: scale and shift from an embedding, and SiLU.

Wu and He 2018, "Group Normalization"; Dhariwal and Nichol 2021, section 3 ("adaptive group normalization").
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run in its interpreter, and so on a CPU: for tests."""
FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_NUMBERS = 2**31  # of one image: the kernels count them in 32 bits


class GroupNorm(nn.GroupNorm):
    """GroupNorm of up to 32 groups of at least 4 channels, then scale and shift where there are any, then SiLU.

    `fused_kernel`: computed by one operation of Triton kernels, with statistics in float32, instead of by torch's
    operations one after the other; ignored where there is no CUDA or no Triton. It is set for the whole network by
    whoever has found out which is faster. The result is of the type that autocast gives convolutions, or else of the
    weights' own type.
    """

    fused_kernel = False

    def __init__(self, channels: int, *, silu: bool = False) -> None:
        groups = next(n for n in range(min(32, max(1, channels // 4)), 0, -1) if channels % n == 0)
        super().__init__(groups, channels)
        self.silu = silu

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], modulation [B, 2 C]: scale, then shift, of the normalised channels -> [B, C, H, W]."""
        dtype = autocast_dtype(x)
        options = self.weight, self.bias, modulation, self.num_groups, self.eps, self.silu
        if self.fused_kernel and can_fuse(x):
            result: Tensor = _Fused.apply(_dense(x), *options, dtype or self.weight.dtype)
            return result
        return _composed(x.to(self.weight.dtype) if dtype is None else x, *options)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes convolutions of x in; None where it is off (the meta device has none)."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def can_fuse(x: Tensor) -> bool:
    """Whether the kernels take these images. Function transforms of `torch.func` do not know them."""
    return (
        HAS_TRITON
        and (x.is_cuda or INTERPRETED)
        and x.dtype in FUSED_TYPES
        and x.dim() == 4
        and 0 < x[:1].numel() < MOST_NUMBERS
        and not torch._C._are_functorch_transforms_active()
    )


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> Tensor:
    """By torch's own operations."""
    x = F.group_norm(x, groups, weight, bias, eps)
    if modulation is not None:
        scale, shift = modulation[..., None, None].chunk(2, dim=1)
        x = x * (1 + scale) + shift
    return F.silu(x) if silu else x


def _dense(x: Tensor) -> Tensor:
    """x itself if its channels lie last or first in memory, without gaps."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


class _Fused(torch.autograd.Function):
    """The same by kernels of our own. Of the inputs only x is kept for the backward pass: one tensor of that size."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        modulation = None if modulation is None else modulation.contiguous()
        y, statistics, factors = torch.ops.diffkit.group_norm(x, weight, bias, modulation, groups, eps, silu, dtype)
        ctx.save_for_backward(x, weight, bias, modulation, statistics, factors)
        ctx.options = groups, eps, silu
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, modulation, statistics, factors = ctx.saved_tensors
        groups, eps, silu = ctx.options
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # gradients of gradients are torch's own
            given = (x, weight, bias, modulation)
            y = _composed(x.to(weight.dtype), weight, bias, modulation, groups, eps, silu)
            wanted = [each for each, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(y, wanted, grad.to(y.dtype), create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None, None, None, None
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        grad_x, affine, grad_modulation = torch.ops.diffkit.group_norm_backward(
            grad.contiguous(memory_format=layout), x, weight, bias, modulation, statistics, factors, groups, silu
        )
        grad_weight, grad_bias = affine.to(weight.dtype).unbind()
        return grad_x, grad_weight, grad_bias, None if modulation is None else grad_modulation, None, None, None, None


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from diffkit.backbones import norm_launch

    return norm_launch.forward(*inputs)


def _backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from diffkit.backbones import norm_launch

    return norm_launch.backward(*inputs)


def _forward_shapes(
    x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    statistics, factors = (x.new_empty(2, len(x), n, dtype=torch.float32) for n in (groups, x.shape[1]))
    return torch.empty_like(x, dtype=rest[-1]), statistics, factors


def _backward_shapes(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    affine = x.new_empty(2, x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), affine, x.new_empty(0) if modulation is None else torch.empty_like(modulation)


torch.library.define(
    "diffkit::group_norm",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? modulation, int groups, float eps, bool silu, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "diffkit::group_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? modulation, Tensor statistics, Tensor factors,"
    " int groups, bool silu) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("diffkit::group_norm", "default", _forward)
torch.library.impl("diffkit::group_norm_backward", "default", _backward)
torch.library.register_fake("diffkit::group_norm", _forward_shapes)
torch.library.register_fake("diffkit::group_norm_backward", _backward_shapes)
