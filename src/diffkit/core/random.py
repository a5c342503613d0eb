"""Counter-based randomness: every number is a pure function of (seed, purpose, position).

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The position is that of an image in
the stream of images seen (training) or in the set being sampled, so nothing depends on batch size, workers or devices,
and resuming needs no generator state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_AT_ONCE = 2**18
Word = TypeVar("Word", int, Tensor)


class Purpose(IntEnum):
    """What a number is used for: each purpose is a stream of its own."""

    TRAIN_NOISE = 0
    TRAIN_LEVEL = 1
    ORDER = 2
    FLIP = 3
    CROP = 4
    LABEL_DROPOUT = 5
    NETWORK = 6
    START_NOISE = 7
    STEP_NOISE = 8
    VALIDATION = 9
    BROWNIAN = 10
    TASK = 11


def _product(multiplier: int, word: Word) -> tuple[Word, Word]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps around, which leaves all 64 bits right."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: Sequence[Word], key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Four words of 32 random bits for each counter of four words: int64 tensors of values below 2**32, or ints."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def bits(seed: int, purpose: Purpose, positions: Tensor, count: int, interval: int | Tensor = 0) -> Tensor:
    """int64 [B, count] of values below 2**32, for int64 positions [B] >= 0.

    `interval` numbers a sampler's steps; of all positions alike, or int64 [B].
    """
    blocks = torch.arange(-(-count // 4), device=positions.device)
    block, position = torch.broadcast_tensors(blocks, positions[:, None])
    if isinstance(interval, Tensor):
        word = (interval[:, None] << 8 | int(purpose)).expand_as(block)
    else:
        word = torch.full_like(block, int(purpose) | interval << 8)
    words = philox((block, word, position & _MASK, position >> 32), _key(seed))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, (seed >> 32) & _MASK


def _one(seed: int, purpose: Purpose, position: int, interval: int = 0) -> tuple[int, int, int, int]:
    """The first four of `bits` for one position, as numbers."""
    return philox((0, int(purpose) | interval << 8, position & _MASK, position >> 32), _key(seed))


def uniform(seed: int, purpose: Purpose, positions: Tensor, count: int = 1) -> Tensor:
    """[B, count] on the device of `positions`: on a CPU float64, strictly inside (0, 1).

    Elsewhere, since not every device has float64, the same numbers rounded to float32, but for those that would be 1.
    """
    words = bits(seed, purpose, positions, count)
    if words.device.type == "cpu":
        return (words.double() + 0.5) / 2**32
    return ((2 * words + 1).float() * 2.0**-33).clamp_(max=1 - 2.0**-24)  # the product rounds once


def normal(seed: int, purpose: Purpose, positions: Tensor, shape: Sequence[int], interval: int | Tensor = 0) -> Tensor:
    """float32 [B, *shape] of unit normal numbers (Box and Muller 1958), on the device of `positions`.

    The bits that they are made of are the same on every device. Logarithm, sine and cosine are the device's own, so
    that the numbers of two devices (or of two kinds of CPU) may differ by a few units in the last place.
    """
    count = math.prod(shape)
    kernel = _kernel(positions.device) if positions.is_cuda else None
    if kernel is None:
        numbers = _transformed(seed, purpose, positions, count, interval)
    elif isinstance(interval, Tensor):
        numbers = kernel(positions, interval, seed, int(purpose), count)
    else:
        numbers = kernel(positions, None, seed, int(purpose) | interval << 8, count)
    return numbers.reshape(len(positions), *shape)


def _transformed(seed: int, purpose: Purpose, positions: Tensor, count: int, interval: int | Tensor) -> Tensor:
    """float32 [B, count]: `normal`, by torch's own operations."""
    words = bits(seed, purpose, positions, count + count % 2, interval)
    # 24 bits are all that float32 holds; the half keeps the logarithm finite.
    radius, angle = ((words >> 8).float() + 0.5).mul_(2.0**-24).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = radius.log().mul_(-2).sqrt_(), angle * (2 * math.pi)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count]


@cache
def _kernel(device: torch.device) -> Callable[[Tensor, Tensor | None, int, int, int], Tensor] | None:
    """The same in one kernel, if the device runs it and it gives the same numbers."""
    try:
        from diffkit.core import normal_kernel

        positions, seed = torch.tensor([7, 2**33 + 5], device=device), 2**61 + 1
        found = normal_kernel.normal(positions, positions >> 32, seed, int(Purpose.START_NOISE), 999)
        expected = _transformed(seed, Purpose.START_NOISE, positions, 999, positions >> 32)
        return normal_kernel.normal if torch.allclose(found, expected, rtol=1e-5, atol=1e-5) else None
    except Exception:  # without Triton, or a compiler for what launches its kernels
        return None


def normals(
    seed: int, purpose: Purpose, positions: Tensor, shape: Sequence[int], intervals: Sequence[int]
) -> list[Tensor]:
    """What `normal` gives at each of the intervals, by as few operations as is faster."""
    if positions.is_cuda and _kernel(positions.device) is not None:
        return [normal(seed, purpose, positions, shape, interval) for interval in intervals]
    at_once = max(1, _AT_ONCE // max(1, len(positions) * math.prod(shape)))
    found: list[Tensor] = []
    for start in range(0, len(intervals), at_once):
        some = intervals[start : start + at_once]
        numbers = torch.cat([torch.full_like(positions, interval) for interval in some])
        found += normal(seed, purpose, positions.repeat(len(some)), shape, numbers).chunk(len(some))
    return found


def golden(seed: int, purpose: Purpose, positions: Tensor) -> Tensor:
    """float64 [B] in (0, 1): `frac(u + i / golden ratio)`, evenly spread over any run of positions i.

    As good as stratification within a batch, and the same at any batch size. On the positions' device.
    """
    start = _one(seed, purpose, 0)[0]
    # Exact in integers: 2**32 / golden ratio, modulo 2**32.
    turns = (positions * _WEYL[0] + start) & _MASK
    return (turns.double() + 0.5) / 2**32


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """int64 [count]: the order in which an epoch visits the examples, a pure function of (seed, epoch)."""
    words = bits(seed, Purpose.ORDER, torch.tensor([epoch]), 2 * count)[0]
    return torch.argsort(words[0::2] << 31 | words[1::2] >> 1, stable=True)


def derived_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A seed for torch's own generator (network dropout), from up to two counters."""
    first, second = (*counters, 0, 0)[:2]
    words = _one(seed, purpose, first, second)
    return words[0] << 31 | words[1] >> 1
