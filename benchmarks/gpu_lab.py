"""What the sections of `gpu_check.py` try: a network in training on images of noise, on any device, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkit.backbones.presets import unet_preset
from diffkit.backbones.unet import unet
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import edm
from diffkit.core.schedules import cosine, over_range
from diffkit.engine.batches import Batches
from diffkit.engine.devices import autocast, finish
from diffkit.engine.resident import resident
from diffkit.engine.speed import EAGER, Way, prepared
from diffkit.engine.train import Progress, Recipe, Remark, State, train
from diffkit.interfaces import ImageSpec

PREDICTION = partial(edm, sigma_data=0.5)
CPU = torch.device("cpu")
TINY: dict[str, Any] = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attention": 8, "patch": 1}


class Wrong(Exception):
    """What was checked does not hold; with the figures that show it."""

    def __init__(self, reason: str, **figures: Any) -> None:
        super().__init__(reason)
        self.figures = figures


class NotHere(Exception):
    """The device has nothing of what is checked."""


class Noise:
    """A data set of random pixels, as far as a training needs one."""

    def __init__(self, spec: ImageSpec, count: int = 1024) -> None:
        self.spec, self.count = spec, count
        shape = (count, spec.height, spec.width, spec.channels)
        self.pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def column(self, kind: str, indices: Any, part: str = "train") -> Any:
        return self.pixels[indices] if kind == "images" else None

    def gather(self, indices: Any, part: str = "train") -> Any:
        return self.pixels[indices], None


@dataclass
class Trainee:
    """A network with its training, whose `events` go on from where `state` is; `run_as` is what computes it."""

    spec: ImageSpec
    batch: int
    network: nn.Module
    run_as: nn.Module
    state: State
    events: Callable[..., Iterator[Any]]
    remarks: list[str] = field(default_factory=list)

    @property
    def recorded(self) -> bool:
        """Whether a CUDA graph was recorded of its steps, be it faster or not."""
        return any("launched as one CUDA graph, " in each or "as fast without" in each for each in self.remarks)

    def steps(self, **how: Any) -> Iterator[Any]:
        """`events` that are steps; what is told beside them goes to `remarks`."""
        for event in self.events(**how):
            if isinstance(event, Progress):
                yield event
            else:
                self.remarks.append(event.text if isinstance(event, Remark) else str(event))

    def take(self, count: int, **how: Any) -> None:
        """That many steps."""
        running = self.steps(**how)
        for _ in range(count):
            next(running)

    def first_gradient(self) -> Tensor:
        """Of all parameters in a row, float64 on the CPU; takes a step."""
        found: list[Tensor] = []

        def note() -> None:
            found.extend(p.grad.double().cpu().flatten() for p in self.network.parameters() if p.grad is not None)

        self.take(1, before_update=note)
        return torch.cat(found)

    def tensors(self) -> dict[str, Tensor]:
        """A copy of its state on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.state.checkpoint().tensors.items()}


@dataclass(frozen=True)
class Lab:
    """The device to be checked. `small`: tiny networks and few steps, to see that the check itself works."""

    device: torch.device
    small: bool = False

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def need_cuda(self, what: str) -> None:
        """Raises NotHere without a GPU of NVIDIA's kind."""
        if not self.cuda:
            raise NotHere(f"{self.device.type} has no {what}.")

    def finish(self) -> None:
        finish(self.device)

    def trainee(
        self,
        size: int = 32,
        preset: str = "small",
        batch: int = 16,
        *,
        device: torch.device | None = None,
        precision: str = "bfloat16",
        way: Way = EAGER,
        graphs: bool = False,
        **options: Any,
    ) -> Trainee:
        """Of a network whose weights are all random: zeros, with which some layers begin, would hide what is wrong."""
        device = device or self.device
        if self.small:
            size, batch = min(size, 16), min(batch, 4)
        spec = ImageSpec(3, size, size)
        torch.manual_seed(0)
        network = unet(spec, **{**(TINY if self.small else unet_preset(preset, spec)), **options})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        run_as = prepared(network.to(device), way)
        recipe = Recipe(batch, batch, 1e-4, 1, (0.9, 0.99), 0.0, 1.0, 5e5, 0)
        state, data = State(network, recipe), Noise(spec, 64 if self.small else 1024)
        kept = resident(data, ("images",), device, 2**34) if device.type == "cuda" else {}

        def events(**how: Any) -> Iterator[Any]:
            return train(
                state,
                Denoiser(run_as, PREDICTION, autocast(device, precision)),
                Batches(data, spec, 0, True, 0.0, resident=kept),
                over_range(cosine, 0.002, 80.0),
                squared_error,
                recipe,
                **{"report_every": 10**9, "cuda_graphs": graphs, **how},
            )

        return Trainee(spec, batch, network, run_as, state, events)

    def milliseconds(self, work: Callable[[], object], warm: int = 3, count: int = 20) -> float:
        """The mean of some calls, after some that do not count."""
        if self.small:
            warm, count = 1, 2
        for _ in range(warm):
            work()
        self.finish()
        start = time.perf_counter()
        for _ in range(count):
            work()
        self.finish()
        return (time.perf_counter() - start) / count * 1e3

    def free(self) -> None:
        """Give back what torch only keeps."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, str]:
    """The greatest relative difference of two states' tensors, and the name of the tensor."""

    def far(name: str) -> float:
        a, b = one[name].double(), other[name].double()
        return float((a - b).norm() / a.norm().clamp(min=1e-6))

    return max((far(name), name) for name in one)
