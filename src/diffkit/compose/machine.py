"""How a machine computes a network, found by trial where it is left open: precision, layout in memory, compilation."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit import durable
from diffkit.compose.parts import dummy_inputs
from diffkit.config import Settings
from diffkit.engine.distributed import World
from diffkit.errors import DiffkitError
from diffkit.interfaces import ImageSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.engine.devices import Autocast
    from diffkit.engine.speed import Ahead, Try, Way


PROBED_PIXELS = 2**13


@dataclass(frozen=True)
class Length:
    """How long a training is to be, by whatever limits it; None = by that not at all."""

    steps: int | None = None
    images: int | None = None
    seconds: float | None = None

    def lasts(self, batch: int, images_per_second: float) -> float:
        """Seconds, roughly."""
        limits = [self.images, None if self.steps is None else self.steps * batch]
        by_images = [limit / images_per_second for limit in limits if limit is not None]
        return min(by_images + ([] if self.seconds is None else [self.seconds]), default=math.inf)


ENDLESS = Length()


def with_precision(settings: Settings, network: nn.Module, spec: ImageSpec, device: torch.device) -> Settings:
    """The precision, by probe if it is still open; a run keeps the one it began with."""
    from diffkit.engine.devices import choose_precision

    most = max(4, PROBED_PIXELS // (spec.height * spec.width))
    (x, c_noise), condition = dummy_inputs(spec, min(most, settings.train.micro_batch or most), device)
    precision = choose_precision(settings.train.precision, device, lambda: network(x, c_noise, **condition))
    network.zero_grad(set_to_none=True)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"precision": precision})})


def with_way(
    settings: Settings,
    network: nn.Module,
    spec: ImageSpec,
    device: torch.device,
    *,
    probe: bool,
    world: World,
    length: Length,
) -> tuple[Settings, Way, list[str]]:
    """Layout and compilation: the fastest by trial for a new run, else as recorded. What fails is done without.

    Of several processes one begins the run, so the others find what it has recorded, and its compiled code in a cache.
    """
    from diffkit.engine.devices import autocast, forget_peak
    from diffkit.engine.speed import COMPILING_PAYS, ON_A_GPU, Way

    train = settings.train
    best, notes = Way(bool(train.channels_last), train.compile == "on", bool(train.fused)), list[str]()
    candidates: tuple[Way, ...] = (best,)
    if probe and device.type == "cuda":
        fitting = [
            way
            for way in ON_A_GPU
            if train.compile in ("auto", "on" if way.compiled else "off")
            and train.channels_last in (None, way.channels_last)
            and train.fused in (None, way.fused)
        ]
        candidates = tuple(fitting) or candidates
    images = min(train.micro_batch or 1, -(-(train.batch_size or 1) // world.size))
    lasts = math.inf

    def ahead(seconds: float) -> float:
        nonlocal lasts
        lasts = length.lasts(train.batch_size or 1, images * world.size / seconds)
        return lasts

    if len(candidates) > 1 or best != best.plain:
        best, notes = fastest(network, spec, images, autocast(device, train.precision), candidates, ahead=ahead)
    if lasts < COMPILING_PAYS:
        notes.append(
            f"Not compiled: that takes minutes, and the training about {lasts:.0f} seconds. "
            "With --set train.compile=on it is."
        )
    forget_peak(device)
    update = {
        "compile": "on" if best.compiled else "off",
        "channels_last": best.channels_last,
        "fused": best.fused,
    }
    return settings.model_copy(update={"train": train.model_copy(update=update)}), best, notes


def fastest(
    network: nn.Module,
    spec: ImageSpec,
    images: int,
    autocast: Autocast,
    candidates: tuple[Way, ...],
    *,
    ahead: Ahead = lambda seconds: math.inf,
    training: bool = True,
) -> tuple[Way, list[str]]:
    """See `diffkit.engine.speed.choose_way`; with `images` at once, or as many as the memory holds."""
    import torch

    from diffkit.engine.devices import release_memory
    from diffkit.engine.speed import choose_way

    while images:
        try:
            attempt = _trial(network, spec, images, autocast, training)
            return choose_way(network, attempt, candidates, ahead=ahead, training=training)
        except torch.OutOfMemoryError:
            images //= 2  # as the work itself will
        release_memory()
    return candidates[0].plain, []


def _trial(network: nn.Module, spec: ImageSpec, images: int, autocast: Autocast, training: bool) -> Try:
    """A call of the network on so many images of noise: zeros cost a GPU less power, so that it runs faster."""
    import torch

    (x, c_noise), condition = dummy_inputs(spec, images, next(network.parameters()).device)
    generator = torch.Generator().manual_seed(0)
    for each in (x, c_noise, *condition.values()):
        each.copy_(torch.randn(each.shape, generator=generator))

    def attempt(network: nn.Module) -> Tensor:
        with autocast():
            result: Tensor = network.train(training)(x, c_noise, **condition)
        return result

    return attempt


def usual_batch(spec: ImageSpec, device: torch.device) -> int:
    """Images at once: enough to keep the device busy, few enough to fit."""
    most = 64 if device.type == "cpu" else 256
    return min(most, max(4, 4 * most * 2**10 // (spec.height * spec.width)))


def for_sampling(network: nn.Module, spec: ImageSpec, device: torch.device, precision: str) -> nn.Module:
    """The network on its device, changed in place; on a GPU small batches are answered as one graph."""
    from diffkit.engine.devices import choose_kernels, keep_freed_memory
    from diffkit.engine.graphs import Graphed

    choose_kernels(device, exact=True)  # whatever a training in this process has chosen
    if device.type == "cpu":
        keep_freed_memory()
    adapt(network, spec, device, precision)
    return Graphed(network) if device.type == "cuda" else network


def adapt(network: nn.Module, spec: ImageSpec, device: torch.device, precision: str) -> None:
    """Change weights to the precision once, and to a layout in memory of their own: that of training may be slower.

    On a GPU the layout is found by trial. What was found for a network on a kind of GPU is kept in the cache, so that
    the same command makes the same images.
    """
    import torch

    from diffkit.engine.devices import autocast
    from diffkit.engine.speed import Way, precast, prepared

    if device.type == "cpu":
        prepared(network, Way(channels_last=True))  # up to a fifth faster at 128 pixels, about the same at 16
    if precision == "bfloat16":
        (x, c_noise), condition = dummy_inputs(spec, 1, device)

        def call() -> None:
            with autocast(device, precision)():
                network(x, c_noise, **condition)

        precast(network, call, device.type, torch.bfloat16)
    if device.type == "cuda":
        prepared(network, _layout(network, spec, device, precision))


def _layout(network: nn.Module, spec: ImageSpec, device: torch.device, precision: str) -> Way:
    """The faster layout on this GPU, by an earlier trial or by one now."""
    from diffkit.engine.devices import autocast
    from diffkit.engine.speed import LAYOUTS, Way

    place = _place(network, spec, device, precision)
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(place.read_text())
        known = Way(channels_last=bool(kept["channels_last"]), fused=bool(kept["fused"]))
        if known.fused:  # whether its kernels can be launched is not said by what is in the name
            known, _ = fastest(network, spec, 1, autocast(device, precision), (known,), training=False)
        return known
    images = usual_batch(spec, device)
    found, _ = fastest(network, spec, images, autocast(device, precision), LAYOUTS, training=False)
    with suppress(DiffkitError, OSError):
        durable.make_folders(place.parent)
        durable.write_json(place, {"channels_last": found.channels_last, "fused": found.fused})
    return found


def _place(network: nn.Module, spec: ImageSpec, device: torch.device, precision: str) -> Path:
    """In the cache, under all that the speed depends on."""
    import torch

    shapes = [[name, str(each.dtype), *each.shape] for name, each in network.named_parameters()]
    what = [torch.__version__, torch.cuda.get_device_name(device), precision, spec.to_dict(), shapes]
    text = json.dumps(what, sort_keys=True)
    return durable.cache_folder() / "layouts" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
