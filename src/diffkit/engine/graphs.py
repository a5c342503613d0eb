"""Small batches on a GPU: all kernels of a network's call replayed at once, as one CUDA graph.

At a few images the GPU is done with each kernel before the next has been launched; a graph is launched once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_POSITIONS = 2**17
"""Images times height times width, above which the kernels take longer than their launches."""
MOST_GRAPHS = 8
WARM_UP = 2
TOLERANCE = 0.02
"""How far, relative to the largest value, a replay may be from the call it stands for (kernels chosen anew)."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class Graphed(nn.Module):
    """A network for sampling, which answers small inputs by replay, and whatever cannot be captured as it is.

    Inputs of one shape share a graph. A graph is used only once its answer has been compared with the network's own.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._graphs: dict[Any, _Graph | None] = {}
        self._capturable = True

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:
        """As the network's own."""
        small = x.is_cuda and len(x) * x.shape[-2] * x.shape[-1] <= MOST_POSITIONS
        if not small or not self._capturable or torch.is_grad_enabled() or self.network.training:
            return self._call(x, c_noise, condition)
        shapes = ((name, tuple(each.shape)) for name, each in {"": x, **condition}.items())
        key = (torch.is_autocast_enabled("cuda"), *shapes)
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            with torch.cuda.device(x.device):
                self._graphs[key] = self._captured(x, c_noise, condition)
        found = self._graphs[key]
        if found is None:
            return self._call(x, c_noise, condition)
        return _replayed(found, [x, c_noise, *condition.values()])

    def _call(self, x: Tensor, c_noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.network(x, c_noise, **condition)
        return result

    def _captured(self, x: Tensor, c_noise: Tensor, condition: dict[str, Tensor]) -> _Graph | None:
        """The call as a graph; None if it cannot be captured, or if the replay answers otherwise.

        It is captured with other inputs than it is then tried with: a graph that ignores them is found out.
        """
        with torch.inference_mode(False):
            inputs = [torch.full_like(each, 0.5) for each in (x, c_noise, *condition.values())]
        named = dict(zip(condition, inputs[2:], strict=True))
        own = torch.cuda.current_stream()
        aside = torch.cuda.Stream()
        try:
            aside.wait_stream(own)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._call(inputs[0], inputs[1], named)
            own.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                output = self._call(inputs[0], inputs[1], named)
            found = _Graph(graph, inputs, output)
            wanted = self._call(x, c_noise, condition)
            replay = _replayed(found, [x, c_noise, *condition.values()])
            near = float((replay - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())
        except RuntimeError:
            self._capturable = False  # what fails once will again, and may leave the allocator half in a capture
            return None
        finally:
            torch.cuda.set_stream(own)  # a capture that fails leaves its own behind
        return found if near else None


def _replayed(found: _Graph, inputs: Sequence[Tensor]) -> Tensor:
    for fixed, tensor in zip(found.inputs, inputs, strict=True):
        fixed.copy_(tensor)
    found.graph.replay()
    return found.output.clone()
