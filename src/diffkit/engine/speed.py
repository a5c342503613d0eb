"""How a network is run: layout in memory, compilation, kernels of our own. Chosen by trying, never a reason to fail."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkit.durable import cache_folder
from diffkit.engine.casts import CastTogether
from diffkit.engine.devices import finish, first_line, is_memory
from diffkit.engine.functions import fast_functions

Try = Callable[[nn.Module], Tensor]
Ahead = Callable[[float], float]
WARMUP, TIMED = 2, 3
GAIN_WANTED = 1.05
AGREEMENT = 0.05
"""By how much answers may differ, over their norm: a whole network in bfloat16 rounds to about a hundredth."""
COMPILING_PAYS = 300.0
"""Seconds of work ahead from which compiling is tried: it takes a minute or more, and saves up to half of them."""


class Way(NamedTuple):
    """Channels last in memory or first; compiled or as written; layers that have a kernel of their own, by that."""

    channels_last: bool = False
    compiled: bool = False
    fused: bool = False

    def __str__(self) -> str:
        layout = f"{'compiled' if self.compiled else 'eager'}, channels {'last' if self.channels_last else 'first'}"
        return layout + (", fused norms" if self.fused else "")

    @property
    def plain(self) -> Way:
        """The same layout without what may fail."""
        return Way(self.channels_last)


EAGER = Way()
LAYOUTS = (EAGER, Way(channels_last=True), Way(channels_last=True, fused=True))
ON_A_GPU = (*LAYOUTS, Way(channels_last=True, compiled=True))


def prepared(network: nn.Module, way: Way) -> nn.Module:
    """The network in this layout, changed in place; compiled, a module beside it that shares its weights."""
    network.to(memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
    for layer in fusible(network):
        layer.fused_kernel = way.fused
    run_as: nn.Module = network
    if way.compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        _mend_inductor(torch.__version__)
        run_as = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    return CastTogether(network, run_as) if next(network.parameters()).device.type == "cuda" else run_as


def fusible(network: nn.Module) -> list[Any]:
    """Its layers that have a kernel of their own, used while their attribute `fused_kernel` is true."""
    return [layer for layer in network.modules() if hasattr(layer, "fused_kernel")]


def layout_of(network: nn.Module) -> Way:
    """As it is run now, not compiled."""
    weights = [each for each in network.parameters() if each.dim() == 4]
    fused = any(layer.fused_kernel for layer in fusible(network))
    return Way(channels_last=any(not each.is_contiguous() for each in weights), fused=fused)


def choose_way(
    network: nn.Module,
    attempt: Try,
    candidates: tuple[Way, ...],
    *,
    ahead: Ahead = lambda seconds: math.inf,
    training: bool = True,
) -> tuple[Way, list[str]]:
    """The fastest of the candidates at `attempt`, which runs a network forward; and notes on those that fail.

    Each is timed forward and, if `training`, backward. The first is left only for a gain of a twentieth. If all fail it
    is the first, but neither compiled nor fused: the training itself may say why. Raises torch.OutOfMemoryError.

    `ahead`: from the seconds of an attempt to those of all the work there is. Where that is too short to pay for
    compiling, no candidate is compiled that comes after one that is not.
    """
    seconds: dict[Way, float] = {}
    notes = []
    with _noisy(network):
        for way in candidates:
            if way.fused and not fusible(network):
                continue
            if way.compiled and seconds and ahead(min(seconds.values())) < COMPILING_PAYS:
                continue
            try:
                if way.fused and not _agrees(network, way, attempt, training):
                    notes.append(f"Not {way}: its kernels give other numbers.")
                    continue
                seconds[way] = _seconds(prepared(network, way), attempt, training)
            except Exception as error:
                if is_memory(error):
                    network.zero_grad(set_to_none=True)
                    raise torch.OutOfMemoryError(str(error)) from error
                notes.append(f"Not {way}: {first_line(error)}")
            network.zero_grad(set_to_none=True)
    first = candidates[0]
    best = min(seconds, key=lambda way: seconds[way] * (1 if way == first else GAIN_WANTED), default=first.plain)
    return best, notes


def precast(network: nn.Module, call: Callable[[], object], device: str, dtype: torch.dtype) -> None:
    """Change the weights that autocast would change to `dtype` at every call once and for all; for sampling.

    `call` runs the network forward under autocast. What it runs without, as first and last layers of a U-Net, stays.
    """
    inside: set[nn.Module] = set()
    outside: set[nn.Module] = set()

    def note(module: nn.Module, _: object) -> None:
        (inside if torch.is_autocast_enabled(device) else outside).add(module)

    layers = [each for each in network.modules() if type(each) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    with torch.inference_mode():
        call()
    for hook in hooks:
        hook.remove()
    for layer in inside - outside:
        layer.to(dtype)


class OfOneShape(nn.Module):
    """A network that answers inputs of one shape compiled, and others as it is: each would be compiled anew."""

    def __init__(self, network: nn.Module, compiled: nn.Module, shape: tuple[int, ...]) -> None:
        """`shape`: that of x, [B, C, H, W]."""
        super().__init__()
        self.network, self.compiled, self.shape = network, compiled, shape

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Tensor) -> Tensor:
        """As the network's own."""
        chosen = self.compiled if tuple(x.shape) == self.shape else self.network
        answer: Tensor = chosen(x, c_noise, **condition)
        return answer


@contextmanager
def _noisy(network: nn.Module) -> Iterator[None]:
    """Inside, weights that are all zero, as some are before training, are noise; afterwards they are as they were.

    Behind them all would be zeros too, and these cost a GPU less power, so that it runs faster. Buffers, which a
    forward pass may change, are put back.
    """
    zeros = {name: value for name, value in network.named_parameters() if not bool(value.any())}
    before = {name: value.detach().clone() for name, value in [*zeros.items(), *network.named_buffers()]}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for each in zeros.values():
                each.copy_(0.02 * torch.randn(each.shape, generator=generator))
        yield
    finally:
        now = {**dict(network.named_parameters()), **dict(network.named_buffers())}  # another layout, another buffer
        with torch.no_grad():
            for name, value in before.items():
                now[name].copy_(value)


def _agrees(network: nn.Module, way: Way, attempt: Try, training: bool) -> bool:
    """Whether the fused kernels give torch's answer and, if `training`, its gradients, but for rounding."""
    device, found = next(network.parameters()).device, []
    for fused in (False, True):
        run_as = prepared(network, way._replace(fused=fused, compiled=False))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)  # for dropout
            if training:
                with fast_functions(device):
                    answer = attempt(run_as)
                    answer.float().square().mean().backward()
            else:
                with torch.inference_mode():
                    answer = attempt(run_as)
        gradients = [each.grad.flatten() for each in network.parameters() if each.grad is not None]
        found.append([answer.detach().float(), *([torch.cat(gradients)] if gradients else [])])
        network.zero_grad(set_to_none=True)
    return all(bool((own - torchs).norm() <= AGREEMENT * torchs.norm()) for torchs, own in zip(*found, strict=True))


def _seconds(network: nn.Module, attempt: Try, training: bool) -> float:
    """The median of three runs, after two that warm up and compile."""
    times, device = [], next(network.parameters()).device
    for _ in range(WARMUP + TIMED):
        start = time.perf_counter()
        if training:
            with fast_functions(device):  # as the training will
                attempt(network).float().square().mean().backward()
        else:
            with torch.inference_mode():
                attempt(network)
        finish(device)
        times.append(time.perf_counter() - start)
    return sorted(times[WARMUP:])[TIMED // 2]


def _mend_inductor(version: str) -> None:
    """Two regressions of torch 2.13 in the training of convolutions (pytorch issues 189239 and 189488)."""
    if version.startswith("2.13."):
        import torch._inductor.config as inductor

        inductor.force_layout_optimization = True
        inductor.loop_reindexing_after_fusion = False
