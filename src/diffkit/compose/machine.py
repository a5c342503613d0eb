"""How a machine computes a network, found by trial where it is left open: precision, layout in memory, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffkit.compose.parts import dummy_inputs
from diffkit.config import Settings
from diffkit.engine.distributed import World
from diffkit.interfaces import ImageSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.engine.speed import Try, Way


PROBED_PIXELS = 2**13


def with_precision(settings: Settings, network: nn.Module, spec: ImageSpec, device: torch.device) -> Settings:
    """The precision, by probe if it is still open; a run keeps the one it began with."""
    from diffkit.engine.devices import choose_precision

    most = max(4, PROBED_PIXELS // (spec.height * spec.width))
    (x, c_noise), condition = dummy_inputs(spec, min(most, settings.train.micro_batch or most), device)
    precision = choose_precision(settings.train.precision, device, lambda: network(x, c_noise, **condition))
    network.zero_grad(set_to_none=True)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"precision": precision})})


def with_way(
    settings: Settings, network: nn.Module, spec: ImageSpec, device: torch.device, *, probe: bool, world: World
) -> tuple[Settings, Way, list[str]]:
    """Layout and compilation: the fastest by trial for a new run, else as recorded. What fails is done without."""
    import torch

    from diffkit.engine.devices import autocast
    from diffkit.engine.speed import ON_A_GPU, Way, choose_way

    train = settings.train
    best, notes = Way(bool(train.channels_last), train.compile == "on"), list[str]()
    candidates: tuple[Way, ...] = (best,)
    if probe and device.type == "cuda":
        fitting = [
            way
            for way in ON_A_GPU
            if train.compile in ("auto", "on" if way.compiled else "off")
            and train.channels_last in (None, way.channels_last)
        ]
        candidates = tuple(fitting) or candidates

    def trial(images: int) -> Try:
        (x, c_noise), condition = dummy_inputs(spec, images, device)

        def attempt(network: nn.Module) -> Tensor:
            with autocast(device, train.precision)():
                result: Tensor = network.train()(x, c_noise, **condition)
            return result

        return attempt

    images = min(train.micro_batch or 1, -(-(train.batch_size or 1) // world.size))
    while images and (len(candidates) > 1 or best.compiled):
        try:
            best, notes = choose_way(network, trial(images), candidates)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            images //= 2  # as the training will
    update = {"compile": "on" if best.compiled else "off", "channels_last": best.channels_last}
    return settings.model_copy(update={"train": train.model_copy(update=update)}), best, notes


def for_sampling(network: nn.Module, spec: ImageSpec, device: torch.device, precision: str) -> nn.Module:
    """The network as it samples on this device: weights changed to the precision once, small batches as one graph."""
    import torch

    from diffkit.engine.devices import autocast, keep_freed_memory
    from diffkit.engine.graphs import Graphed
    from diffkit.engine.speed import precast

    if device.type == "cpu":
        keep_freed_memory()
    if precision == "bfloat16":
        (x, c_noise), condition = dummy_inputs(spec, 1, device)

        def call() -> None:
            with autocast(device, precision)():
                network(x, c_noise, **condition)

        precast(network, call, device.type, torch.bfloat16)
    return Graphed(network) if device.type == "cuda" else network
