"""How a network samples in large numbers, and during a training."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from diffkit.compose.machine import adapt, fastest
from diffkit.interfaces import ImageSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.core.denoiser import Denoiser

MANY_CALLS = 300
"""Network calls from which it is tried whether compiling pays."""


def for_many(denoiser: Denoiser, spec: ImageSpec, device: torch.device, images: int, calls: int) -> Denoiser:
    """The denoiser for so many network calls with `images` at once: compiled, on a GPU, where they pay for it.

    `denoiser` as it samples; what fails is done without.
    """
    from diffkit.engine.graphs import Graphed
    from diffkit.engine.speed import OfOneShape, layout_of, prepared

    network = denoiser.network
    if calls < MANY_CALLS or device.type != "cuda":
        return denoiser
    own = network.network if isinstance(network, Graphed) else network
    plain = layout_of(own)
    candidates = (plain, plain._replace(compiled=True, fused=False))  # the compiler fuses norms itself
    way, _ = fastest(
        own, spec, images, denoiser.autocast, candidates, ahead=lambda seconds: calls * seconds, training=False
    )
    run_as = prepared(own, way)
    if not way.compiled:
        return denoiser
    shape = (images, spec.channels, spec.height, spec.width)
    return replace(denoiser, network=OfOneShape(network, run_as, shape).eval())


class Follower:
    """The averaged network of a training, for its previews and held-out losses.

    On a GPU a copy, made as a loaded model is, follows the average; elsewhere, or where the memory does not hold one,
    it is the average itself.
    """

    def __init__(self, spec: ImageSpec, device: torch.device, precision: str) -> None:
        self.spec, self.device, self.precision = spec, device, precision
        self._copy: nn.Module | None = None
        self._wanted = device.type == "cuda"

    def __call__(self, average: nn.Module) -> nn.Module:
        """The network with the weights of `average` as they are now, in evaluation mode."""
        import torch

        if self._wanted and self._copy is None:
            self._copy = self._copied(average)
            self._wanted = self._copy is not None
        if self._copy is None:
            return average
        with torch.no_grad():
            for here, there in zip(_tensors(self._copy), _tensors(average), strict=True):
                here.copy_(there)
        return self._copy

    def _copied(self, average: nn.Module) -> nn.Module | None:
        from diffkit.engine.devices import forget_peak, is_memory, release_memory

        try:
            network = copy.deepcopy(average)
            adapt(network, self.spec, self.device, self.precision)
        except Exception as error:
            if not is_memory(error):
                raise
        else:
            forget_peak(self.device)  # the trial's; the next step has its own
            return network.eval()
        release_memory()
        return None


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
