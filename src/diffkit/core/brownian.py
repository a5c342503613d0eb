"""A Brownian path for each image, the same for every sampling grid.

Samplers that add noise ask for it interval by interval. Drawn anew for every interval it would be another picture at
another number of steps; as increments of one path it is the same picture, seen more finely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

OCTAVES = 16
FINEST = 23
Draw = Callable[[Sequence[int]], Sequence[Tensor]]


@dataclass
class _Node:
    """The path from `start` to `start + 2^-depth` of the axis: its increment there, and the path's value before."""

    number: int
    start: float
    before: Tensor
    increment: Tensor


class Path:
    """W at noise levels s, where W is a Brownian motion whose clock is the signal-to-noise ratio 1 / s^2.

    In this clock the noises that ancestral and SDE samplers add over two adjoining intervals make up, scaled, exactly
    the noise of both. The path is halved along log s, down to a thirty-second of the grid's smallest step: a tree whose
    nodes are numbered, so that `draw(numbers)`, of each unit normal numbers [B, C, H, W], depends on nothing else.
    Levels are rounded to the ends of the smallest pieces; increments keep their variance and their independence.
    """

    def __init__(self, draw: Draw, sigmas: Sequence[float]) -> None:
        places = [_place(s) for s in sigmas if s > 0]
        smallest = min((abs(a - b) for a, b in pairwise(places)), default=1.0)
        self.draw = draw
        self.depth = min(FINEST, max(0, math.ceil(math.log2(32 / max(smallest, 2.0**-FINEST)))))
        self._way: list[_Node] = []

    def noise(self, s: float, s_next: float) -> Tensor | None:
        """The increment from s down to s_next > 0, at unit variance; None for too short an interval."""
        start, end = (round(_place(level) * 2**self.depth) for level in (s, s_next))
        if start >= end:
            return None
        first, last = (_clock(place / 2**self.depth) for place in (start, end))
        return (self._value(end) - self._value(start)) / math.sqrt(last - first)

    def _value(self, place: int) -> Tensor:
        """W at a multiple of the smallest piece."""
        if not self._way:
            (drawn,) = self.draw([0])
            whole = drawn * math.sqrt(_clock(1.0) - _clock(0.0))
            self._way = [_Node(1, 0.0, whole * 0, whole)]
        at = place / 2**self.depth
        if at == 0:
            return self._way[0].before
        # The node that ends there, or holds it: to the left of every middle it does not lie beyond.
        while not self._way[-1].start < at <= self._way[-1].start + 2.0 ** (1 - len(self._way)):
            self._way.pop()
        for drawn in self.draw(self._to_halve(at)):
            self._way.append(self._half(self._way[-1], at, drawn))
        return self._way[-1].before + self._way[-1].increment

    def _to_halve(self, at: float) -> list[int]:
        """The numbers of the nodes that hold `at`, from the lowest of the way down."""
        number, start, width = self._way[-1].number, self._way[-1].start, 2.0 ** (1 - len(self._way))
        found = []
        while start + width != at:
            found.append(number)
            width /= 2
            number *= 2
            if at > start + width:
                number, start = number + 1, start + width
        return found

    def _half(self, node: _Node, at: float, drawn: Tensor) -> _Node:
        """The half of a node in which `at` lies: a Brownian bridge's value at the middle."""
        width = 2.0 ** -len(self._way)
        low, middle, high = (_clock(node.start + part * width) for part in (0, 1, 2))
        share = (middle - low) / (high - low)
        left = share * node.increment + math.sqrt((high - middle) * share) * drawn
        if at <= node.start + width:
            return _Node(2 * node.number, node.start, node.before, left)
        return _Node(2 * node.number + 1, node.start + width, node.before + left, node.increment - left)


def _place(s: float) -> float:
    """Where a level lies on the axis, even in log s: 0 at s = 2^16, 1 at s = 2^-16."""
    return min(1.0, max(0.0, (OCTAVES - math.log2(s)) / (2 * OCTAVES)))


def _clock(place: float) -> float:
    """1 / s^2."""
    return float(2.0 ** (2 * (2 * OCTAVES * place - OCTAVES)))
