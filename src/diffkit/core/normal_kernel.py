"""`diffkit.core.random.normal` as one kernel on a GPU, in Triton, which torch brings along there.

The random bits are those of the CPU, and so are the numbers in (0, 1) made of them: integers, one addition and products
by powers of two. Logarithm, sine and cosine are CUDA's own, as in torch's operations there, each within an ulp or two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Counters, of four numbers each, per program."""
TURN = tl.constexpr(2 * math.pi)


@triton.jit(do_not_specialize=["seed", "word"])  # type: ignore[untyped-decorator]
def _kernel(numbers, positions, intervals, seed, word, count, programs, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) // programs
    block = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + row)
    if intervals is not None:
        word += tl.load(intervals + row) << 8
    low, high = position & 0xFFFFFFFF, position >> 32
    words = tl.philox(seed, block.to(tl.uint32), word.to(tl.uint32), low.to(tl.uint32), high.to(tl.uint32))
    cos0, sin0 = _pair(words[0], words[1])
    cos1, sin1 = _pair(words[2], words[3])
    found = tl.interleave(tl.interleave(cos0, cos1), tl.interleave(sin0, sin1))
    place = tl.program_id(0) % programs * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(numbers + row.to(tl.int64) * count + place, found, mask=place < count)


@triton.jit
def _pair(first, second):  # type: ignore[no-untyped-def]
    radius = tl.sqrt_rn(tl.log(_unit(first)) * -2)
    angle = _unit(second) * TURN
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _unit(word):  # type: ignore[no-untyped-def]
    return ((word >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216)


def launch(positions: Tensor, intervals: Tensor | None, seed: int, word: int, count: int) -> Tensor:
    """float32 [B, count] for int64 positions [B]; `word`: the purpose, and the interval where it is that of all."""
    numbers = positions.new_empty(len(positions), count, dtype=torch.float32)
    if numbers.numel():
        programs = triton.cdiv(count, 4 * BLOCK)
        with torch.cuda.device_of(positions):
            # A multiplication and an addition are never made one, which would round otherwise than two.
            _kernel[(len(positions) * programs,)](
                numbers, positions, intervals, seed, word, count, programs, BLOCK=BLOCK, enable_fp_fusion=False
            )
    return numbers


def _shape(positions: Tensor, intervals: Tensor | None, seed: int, word: int, count: int) -> Tensor:
    return positions.new_empty(len(positions), count, dtype=torch.float32)


# An operator of torch, so that fake tensors and the compiler know its result without running it.
torch.library.define(
    "diffkit::normal", "(Tensor positions, Tensor? intervals, int seed, int word, int count) -> Tensor"
)
torch.library.impl("diffkit::normal", "cuda", launch)
torch.library.register_fake("diffkit::normal", _shape)


def normal(positions: Tensor, intervals: Tensor | None, seed: int, word: int, count: int) -> Tensor:
    """See `launch`; positions and intervals on a GPU. Of `seed` 64 bits count."""
    signed = (seed + 2**63) % 2**64 - 2**63
    intervals = None if intervals is None else intervals.contiguous()
    found: Tensor = torch.ops.diffkit.normal(positions.contiguous(), intervals, signed, word, count)
    return found
