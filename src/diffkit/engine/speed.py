"""How a network is run: its layout in memory, and whether it is compiled. Chosen by trying, never a reason to fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffkit.durable import cache_folder
from diffkit.engine.casts import CastTogether
from diffkit.engine.devices import finish, first_line, is_memory
from diffkit.engine.functions import fast_functions

Try = Callable[[nn.Module], Tensor]
WARMUP, TIMED = 2, 3
GAIN_WANTED = 1.05


class Way(NamedTuple):
    """Channels last in memory or first; compiled or as written."""

    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return f"{'compiled' if self.compiled else 'eager'}, channels {'last' if self.channels_last else 'first'}"


EAGER = Way()
ON_A_GPU = (EAGER, Way(channels_last=True), Way(channels_last=True, compiled=True))


def prepared(network: nn.Module, way: Way) -> nn.Module:
    """The network in this layout, changed in place; compiled, a module beside it that shares its weights."""
    network.to(memory_format=torch.channels_last if way.channels_last else torch.contiguous_format)
    run_as: nn.Module = network
    if way.compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
        _mend_inductor(torch.__version__)
        run_as = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    return CastTogether(network, run_as) if next(network.parameters()).device.type == "cuda" else run_as


def choose_way(network: nn.Module, attempt: Try, candidates: tuple[Way, ...]) -> tuple[Way, list[str]]:
    """The fastest of the candidates at `attempt`, which runs a network forward; and notes on those that fail.

    Each is timed forward and backward. The first is left only for a gain of a twentieth. If all fail it is the first,
    but not compiled: the training itself may say why. Raises torch.OutOfMemoryError.
    """
    seconds, notes = {}, []
    for way in candidates:
        try:
            seconds[way] = _seconds(prepared(network, way), attempt)
        except Exception as error:
            if is_memory(error):
                network.zero_grad(set_to_none=True)
                raise torch.OutOfMemoryError(str(error)) from error
            notes.append(f"Not {way}: {first_line(error)}")
        network.zero_grad(set_to_none=True)
    first = candidates[0]
    plain = first._replace(compiled=False)
    best = min(seconds, key=lambda way: seconds[way] * (1 if way == first else GAIN_WANTED), default=plain)
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


def _seconds(network: nn.Module, attempt: Try) -> float:
    """The median of three runs, after two that warm up and compile."""
    times, device = [], next(network.parameters()).device
    for _ in range(WARMUP + TIMED):
        start = time.perf_counter()
        with fast_functions(device):  # as the training will
            attempt(network).float().square().mean().backward()
        finish(device)
        times.append(time.perf_counter() - start)
    return sorted(times[WARMUP:])[TIMED // 2]


def _mend_inductor(version: str) -> None:
    """Two regressions of torch 2.13 in the training of convolutions (pytorch issues 189239 and 189488)."""
    if version.startswith("2.13."):
        import torch._inductor.config as inductor

        inductor.force_layout_optimization = True
        inductor.loop_reindexing_after_fusion = False
