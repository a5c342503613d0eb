"""Sampling speed beside diffusers: the same network, solver (DDIM) and number of calls, in turns, in one process.

    python benchmarks/sampling.py [--device cuda] [--size 128] [--calls 20] [--rounds 5] [--resume]

From noise to 8-bit images in memory, at a large batch and at one image. diffkit makes the network ready as
`diffkit sample` does, and computes in float32 as diffusers does by default; where the device is faster in bfloat16 also
in that, as both would be told to. Writes results/sampling-DEVICE.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import asked, begun, place, show, spread, units, write
from torch import nn
from training import diffusers_network

from diffkit.compose.machine import for_sampling
from diffkit.core.denoiser import Denoiser
from diffkit.core.predictions import eps
from diffkit.core.samplers.onestep import euler
from diffkit.core.schedules import cosine, over_range, sampling_grid
from diffkit.engine.devices import autocast, choose_precision, finish
from diffkit.engine.sample import Plan, sample
from diffkit.interfaces import ImageSpec
from peers import AsBackbone


def with_diffusers(network: nn.Module, batch: int, calls: int) -> None:
    from diffusers import DDIMPipeline, DDIMScheduler

    pipeline = DDIMPipeline(network, DDIMScheduler())  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    images: Any = pipeline(batch_size=batch, num_inference_steps=calls, output_type="pt").images
    assert (images.float() * 255).round().to("cpu", torch.uint8).shape[0] == batch


def with_diffkit(denoiser: Denoiser, size: int, batch: int, calls: int) -> None:
    grid = sampling_grid(over_range(cosine, 0.002, 80.0), calls)
    plan = Plan(euler, grid, (0.0, 0.0, 0.0))
    (made,) = sample(denoiser, ImageSpec(3, size, size), plan, range(batch), batch_size=batch)
    assert made.pixels.shape[0] == batch and made.calls == calls


def main() -> None:
    options = asked(large_batch=256, calls=20, rounds=5)
    device, size, calls, large = options.device, options.size, options.calls, options.large

    def network() -> nn.Module:
        return diffusers_network(size, large).to(device).eval()

    def ours(precision: str) -> Denoiser:
        layout = torch.contiguous_format if large else torch.channels_last
        backbone = AsBackbone(network().to(memory_format=layout), 250.0, lambda answer: answer.sample)
        ready = for_sampling(backbone.eval().requires_grad_(False), ImageSpec(3, size, size), device, precision)
        return Denoiser(ready, eps, autocast(device, precision))

    theirs, full = network(), ours("float32")
    x = torch.randn(8, 3, size, size, device=device)
    precision = choose_precision("auto", device, lambda: theirs(x, 0).sample)
    theirs.zero_grad(set_to_none=True)
    contestants: dict[str, Callable[[int], None]] = {
        "diffkit": lambda batch: with_diffkit(full, size, batch, calls),
        "diffusers": lambda batch: with_diffusers(theirs, batch, calls),
    }
    if precision == "bfloat16":
        half, in_half = ours("bfloat16"), network().to(torch.bfloat16)
        contestants["diffkit, bfloat16"] = lambda batch: with_diffkit(half, size, batch, calls)
        contestants["diffusers, bfloat16"] = lambda batch: with_diffusers(in_half, batch, calls)

    def measured(batch: int) -> dict[str, Any]:
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(options.rounds + 1):
            for name, make in contestants.items():
                finish(device)
                start = time.perf_counter()
                make(batch)
                finish(device)
                if number:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
            print(batch, *(f"{name} {values[-1:]}" for name, values in seconds.items()), flush=True)
        figures = {}
        for name, values in seconds.items():
            own = seconds[name.replace("diffusers", "diffkit")]
            figures[name] = {
                "images_per_second": spread([batch / value for value in values]),
                "diffkit_ratio": spread([v / u for u, v in zip(own, values, strict=True)]),
            }
        return figures

    name = f"sampling-{place(device)}"
    batches = begun(name, device, options.resume).get("batches", {})

    def keep() -> None:
        write(name, {"size": size, "calls": calls, "batches": batches}, device)
        show("sampling", device, table, place(device))

    units(batches, {str(batch): partial(measured, batch) for batch in (options.batch, 1)}, keep)


def table(results: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md."""
    lines = ["| batch | sampler | images a second | diffkit is faster by |", "|---|---|---|---|"]
    for batch, contestants in results["batches"].items():
        for name, figures in contestants.items():
            speed, ratio = figures["images_per_second"], figures["diffkit_ratio"]
            lines.append(
                f"| {batch} | {name} | {speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f}) "
                f"| {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
