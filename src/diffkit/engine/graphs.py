"""CUDA graphs: the kernels of a piece of work, recorded once and from then on launched all together.

With few images the GPU is done with each kernel before the next has been launched.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_POSITIONS = 2**17
"""Images times height times width, above which the kernels of one call take longer than their launches."""
MOST_GRAPHS = 8
TOLERANCE = 0.02


class Graph(NamedTuple):
    """Work on tensors of fixed shapes and places. What a call returns is overwritten by the next."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs for these inputs, which may be on the CPU."""
        for fixed, given in zip(self.inputs, inputs, strict=True):
            fixed.copy_(given, non_blocking=True)
        self.replay()
        return self.outputs


def graphs_on(device: torch.device) -> bool:
    """Whether the device has such graphs."""
    return device.type == "cuda"


def record(work: Callable[..., tuple[Tensor, ...]], like: Sequence[Tensor], device: torch.device) -> Graph:
    """`work` for inputs of these shapes and types, called a few times with zeros; then it is never called again.

    So whoever compares an answer of the graph with the work's own finds out if it ignores its inputs. Raises whatever
    the work does; RuntimeError if it waits for the device: found out before anything is recorded, since a recording
    that fails costs more.
    """
    with torch.inference_mode(False):
        inputs = tuple(torch.zeros_like(each, device=device) for each in like)
    gc.collect()
    torch.cuda.empty_cache()
    with torch.cuda.device(device):
        own, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        try:
            aside.wait_stream(own)
            with torch.cuda.stream(aside):
                work(*inputs)  # which may bring tables there
                with _no_waiting():
                    work(*inputs)
            own.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with _generator_kept(), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                outputs = work(*inputs)
        finally:
            torch.cuda.set_stream(own)  # a capture that fails leaves its own behind
    return Graph(inputs, outputs, graph.replay)


@contextmanager
def _no_waiting() -> Iterator[None]:
    """What waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _generator_kept() -> Iterator[None]:
    """Up to torch 2.13 a recording that fails leaves the device's generator unable to draw: it gets another state."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    try:
        yield
    except BaseException:
        generator.graphsafe_set_state(state)
        raise


def near(replayed: Tensor | None, wanted: Tensor | None, least: float = 0.0) -> bool:
    """Whether a replay's answer is that of the work itself, but for rounding by kernels chosen anew.

    `least`: a norm below which the wanted one is rounding itself.
    """
    if replayed is None or wanted is None:
        return replayed is wanted
    return float((replayed - wanted).norm()) <= TOLERANCE * max(least, float(wanted.norm()))


class Graphed(nn.Module):
    """A network for sampling, which answers small inputs by replay, and whatever cannot be recorded as it is.

    Inputs of one shape share a graph. A graph is used only once its answer has been compared with the network's own.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._graphs: dict[Any, Graph | None] = {}
        self._recordable = True

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:
        """As the network's own."""
        small = graphs_on(x.device) and len(x) * x.shape[-2] * x.shape[-1] <= MOST_POSITIONS
        if not small or not self._recordable or torch.is_grad_enabled() or self.network.training:
            return self._call(x, c_noise, condition)
        shapes = ((name, tuple(each.shape)) for name, each in {"": x, **condition}.items())
        key = (torch.is_autocast_enabled(x.device.type), *shapes)
        if key not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                self._graphs.pop(next(iter(self._graphs)))
            self._graphs[key] = self._recorded(x, c_noise, condition)
        found = self._graphs[key]
        return self._call(x, c_noise, condition) if found is None else found(x, c_noise, *condition.values())[0].clone()

    def _call(self, x: Tensor, c_noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        result: Tensor = self.network(x, c_noise, **condition)
        return result

    def _recorded(self, x: Tensor, c_noise: Tensor, condition: dict[str, Tensor]) -> Graph | None:
        """The call as a graph; None if it cannot be recorded, or if the replay answers otherwise."""

        def work(x: Tensor, c_noise: Tensor, *rest: Tensor) -> tuple[Tensor]:
            return (self._call(x, c_noise, dict(zip(condition, rest, strict=True))),)

        try:
            graph = record(work, (x, c_noise, *condition.values()), x.device)
            (answer,) = graph(x, c_noise, *condition.values())
        except Exception:
            self._recordable = False  # what fails once will again, and may leave the allocator half in a capture
            return None
        return graph if near(answer, self._call(x, c_noise, condition)) else None
