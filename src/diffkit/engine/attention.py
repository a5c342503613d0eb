"""Attention on a CPU in bfloat16: products of matrices in pieces that stay in the processor's cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**19  # weights, positions by positions, that are worked at together: 1 MiB
SMALLEST, LARGEST = 2**15, 2**20  # weights: of all heads together, and of a single one
LARGEST_AMX = 2**18  # where the processor has AMX, which torch's kernel makes more of
# By what autocast is on for: the types that torch itself would compute in bfloat16.
BECOME_BFLOAT16: dict[torch.dtype | None, set[torch.dtype]] = {
    None: {torch.bfloat16},
    torch.bfloat16: {torch.bfloat16, torch.float16, torch.float32},
}
torchs = F.scaled_dot_product_attention


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of matrices in bfloat16, and torch makes use of it."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    """As torch's function, which is left what does not fit; on a CPU in bfloat16 that takes 1.3 to 7 times as long as
    these pieces do, forward and backward, with up to a thousand positions.

    What autocast does between any two layers is done within: results are rounded to bfloat16.
    """
    if attn_mask is None and not dropout_p and not is_causal and not any(rest.values()) and _fits(query, key, value):
        result: Tensor = _Pieces.apply(*(each.to(torch.bfloat16) for each in (query, key, value)), scale)
        return result
    return torchs(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)


def _fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether these [..., N, D], [..., M, D] and [..., M, E] are to be in bfloat16 and faster in pieces."""
    if q.device.type != "cpu" or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
        return False
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    weights = q.shape[-2] * k.shape[-2]
    in_bfloat16 = {q.dtype, k.dtype, v.dtype} <= BECOME_BFLOAT16.get(autocast, set())
    largest = LARGEST_AMX if has_amx() else LARGEST
    return in_bfloat16 and weights <= largest and weights * q.shape[:-2].numel() >= SMALLEST


class _Pieces(torch.autograd.Function):
    """softmax(q k' scale) v for bfloat16 [..., N, D], [..., M, D] and [..., M, E].

    The weights are not kept but found again for the gradients, as in FlashAttention (Dao et al. 2022, appendix B.2).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        ctx.shapes, ctx.scale = (q.shape, k.shape, v.shape), q.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast("cpu", enabled=False):
            q, k, v = (each.reshape(-1, *each.shape[-2:]) for each in (q * ctx.scale, k, v))
            result = q.new_empty(*q.shape[:-1], v.shape[-1])
            for piece in _pieces(q, k):
                torch.bmm(_weights(q[piece], k[piece]), v[piece], out=result[piece])
        ctx.save_for_backward(q, k, v)
        return result.view(*ctx.shapes[0][:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        grad = grads[0].reshape(*q.shape[:-1], -1)
        # Those of k and v are found transposed: the product of a wide matrix with a narrow one is faster that way.
        grad_q, grad_k, grad_v = (q.new_empty(shape) for shape in (q.shape, k.mT.shape, v.mT.shape))
        with torch.autocast("cpu", enabled=False):
            for piece in _pieces(q, k):
                weights, own = _weights(q[piece], k[piece]), grad[piece]
                torch.bmm(own.mT, weights, out=grad_v[piece])
                logits = torch._softmax_backward_data(torch.bmm(own, v[piece].mT), weights, -1, weights.dtype)
                torch.bmm(logits, k[piece], out=grad_q[piece])
                torch.bmm(q[piece].mT, logits, out=grad_k[piece])
        grad_q *= ctx.scale
        found = (grad_q, grad_k.mT, grad_v.mT)
        return *(each.reshape(shape) for each, shape in zip(found, ctx.shapes, strict=True)), None


def _weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(q, k.mT).softmax(-1)


def _pieces(q: Tensor, k: Tensor) -> list[slice]:
    """As many heads at a time as fit."""
    size = max(1, PIECE // (q.shape[1] * k.shape[1]))
    return [slice(start, start + size) for start in range(0, len(q), size)]
