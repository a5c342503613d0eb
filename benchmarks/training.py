"""Training speed beside other trainers: the same network, images, batch and device, in turns, in one process.

    python benchmarks/training.py [--device cuda] [--size 128] [--batch 64] [--rounds 5] [--seconds 6] [--resume]

Each trainer (see `peers.py`) takes a turn of some seconds in every round. The networks, diffusers' UNet2DModel and
denoising-diffusion-pytorch's Unet, are diffkit's backbone, too. On a GPU they are those of the examples at 128x128;
elsewhere smaller ones of the same families, of UNet2DModel also that of the example at half its width and size. Writes
results/training-KIND.json (cpu, cpu-amx or, of a GPU, cuda-MODEL), network by network: images a second, ratios by
round, the share of the peak, which is measured by a large product of matrices (a large convolution on a CPU) in the
same run, and of the roofline (see `roofline`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import asked, begun, kind, scratch, show, spread, units, write
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import peers
from diffkit.engine.devices import choose_precision, finish

Make = Callable[[], nn.Module]
IMAGES, LARGE_IMAGES = 2048, 8192
UNET2D, UNET = "UNet2DModel", "denoising-diffusion-pytorch Unet"
HALF_SIZE, HALF_BATCH = 64, 16


def diffusers_network(size: int, large: bool) -> nn.Module:
    """The example's default on a GPU; else half as wide or, of small images, three stages, attention in the second."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    if large:
        channels, attends = (128, 128, 256, 256, 512, 512), 4
    elif size >= HALF_SIZE:
        channels, attends = (64, 64, 128, 128, 256, 256), 4
    else:
        channels, attends = (64, 128, 128), 1
    down = ["AttnDownBlock2D" if level == attends else "DownBlock2D" for level in range(len(channels))]
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=channels,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
    )


def lucidrains_network(large: bool, flash: bool) -> nn.Module:
    """The README's network on a GPU; else a narrower one of three stages."""
    from denoising_diffusion_pytorch import Unet

    torch.manual_seed(0)
    dim, multipliers = (64, (1, 2, 4, 8)) if large else (32, (1, 2, 4))
    return Unet(dim=dim, dim_mults=multipliers, flash_attn=flash)


@dataclass(frozen=True)
class Leg:
    """A network, the images that it is trained on, and its trainers: first of all diffkit."""

    name: str
    network: nn.Module
    size: int
    batch: int
    trainers: dict[str, Callable[[], Iterator[None]]]


def legs(folder: Path, size: int, batch: int, device: torch.device, half: str) -> dict[str, Callable[[], Leg]]:
    """By name; their images and sets are put into the folder when they are made."""
    makers: list[tuple[str, Callable[..., Leg], int, int]] = [(UNET2D, diffusers_leg, size, batch)]
    if device.type != "cuda" and size < HALF_SIZE:
        makers.append((UNET2D, diffusers_leg, HALF_SIZE, HALF_BATCH))
    makers.append((UNET, lucidrains_leg, size, batch))
    return {
        unit(name, size, batch): partial(make, folder, size, batch, device, half) for name, make, size, batch in makers
    }


def unit(name: str, size: int, batch: int) -> str:
    """What a leg is measured as."""
    return f"{name} at {size}x{size}, batch {batch}"


def lucidrains_leg(folder: Path, size: int, batch: int, device: torch.device, half: str) -> Leg:
    second: Callable[[bool], nn.Module] = partial(lucidrains_network, device.type == "cuda")
    rest = (*files(folder, size)[:1], size, batch, device, folder / "results")
    name = "denoising-diffusion-pytorch"
    trainers = {
        "diffkit": lambda: peers.diffkit(
            peers.AsBackbone(second(True), 250.0, lambda answer: answer), files(folder, size)[1], batch, device, half
        ),
        f"{name} stock": lambda: peers.alone(peers.lucidrains("stock", second(False), *rest)),
        f"{name} switched": lambda: peers.alone(peers.lucidrains("switched", second(True), *rest)),
    }
    return Leg(UNET, second(True), size, batch, trainers)


def diffusers_leg(folder: Path, size: int, batch: int, device: torch.device, half: str) -> Leg:
    make: Make = partial(diffusers_network, size, device.type == "cuda")
    pictures, data = files(folder, size)
    rest = (pictures, size, batch, device)
    trainers = {
        "diffkit": lambda: peers.diffkit(
            peers.AsBackbone(make(), 250.0, lambda answer: answer.sample), data, batch, device, half
        ),
        "diffusers stock": lambda: peers.alone(peers.diffusers("stock", make(), *rest)),
        "diffusers switched": lambda: peers.alone(peers.diffusers("switched", make(), *rest)),
        "diffusers tuned": lambda: peers.alone(peers.diffusers("tuned", make(), *rest)),
        "k-diffusion stock": lambda: peers.alone(peers.k_diffusion("stock", make(), *rest)),
        "k-diffusion switched": lambda: peers.alone(peers.k_diffusion("switched", make(), *rest)),
    }
    return Leg(UNET2D, make(), size, batch, trainers)


def files(folder: Path, size: int) -> tuple[Path, Path]:
    """Image files and a prepared set of them, made once."""
    from diffkit.datasets.folder import folder as source
    from diffkit.engine.prepare import PrepareOptions, prepare

    pictures, data = folder / f"images-{size}", folder / f"set-{size}"
    if not data.exists():
        images(pictures, size)
        deque(prepare(source(str(pictures)), data, PrepareOptions(size, size)), maxlen=0)
    return pictures, data


def images(folder: Path, size: int) -> None:
    """PNG files of smooth random colours with some grain, about as large as those of photos; more of large ones."""
    folder.mkdir(parents=True, exist_ok=True)

    def make(number: int) -> None:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (size, size, 3))
        pixels = np.clip(np.asarray(coarse).astype(int) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.png")

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        deque(threads.map(make, range(LARGE_IMAGES if size > HALF_SIZE else IMAGES)), maxlen=0)


def peak(device: torch.device, half: str) -> float:
    """Operations a second in the best case: of a product of matrices on a GPU, of a wide convolution on a CPU."""
    dtype = torch.bfloat16 if half == "bfloat16" else torch.float32
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        work, count = lambda: a @ a, 2 * 8192**3
    else:
        x, weight = torch.randn(8, 256, 32, 32, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
        work, count = lambda: F.conv2d(x, weight, padding=1), 2 * 8 * 1024 * 256 * 256 * 9
    best = 0.0
    with torch.inference_mode():
        for _ in range(12):
            start = time.perf_counter()
            work()
            finish(device)
            best = max(best, count / (time.perf_counter() - start))
    return best


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target, best = torch.zeros_like(source), 0.0
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        finish(device)
        best = max(best, 2 * source.numel() / (time.perf_counter() - start))
    return best


def roofline(network: nn.Module, size: int, flops: float, bytes_a_second: float) -> float:
    """Images a second that no kernels could pass which read and write every layer's activations once (bfloat16).

    Each convolution takes as long as its operations or its traffic, whichever is longer; each normalisation, fused with
    what follows it, 6 bytes a value forward and 10 backward; everything else its operations. Nothing for the optimiser.
    """
    seconds, counted = 0.0, 0.0

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal seconds, counted
        if isinstance(module, nn.GroupNorm):
            seconds += 16 * output.numel() / bytes_a_second
            return
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        work = 3 * 2 * output.numel() * weight.numel() / weight.shape[0]
        counted += work
        seconds += max(work / flops, 3 * 2 * (inputs[0].numel() + output.numel()) / bytes_a_second)

    layers = [each for each in network.modules() if isinstance(each, nn.Conv2d | nn.Linear | nn.GroupNorm)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    total = 3 * operations(network, size)
    for hook in hooks:
        hook.remove()
    return 1 / (seconds + max(0.0, total - counted) / flops)


def turn(steps: Iterator[None], seconds: float, batch: int, device: torch.device) -> float:
    """Images a second over a turn; on a GPU, after a step that takes what memory others have kept."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        next(steps)
    finish(device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(steps)
        done += batch
    finish(device)
    return done / (time.perf_counter() - start)


def compete(
    makers: dict[str, Callable[[], Iterator[None]]], rounds: int, seconds: float, batch: int, device: torch.device
) -> dict[str, Any]:
    """Each contestant's images a second in every round, and the time that its first step took.

    None for one whose step the memory of the GPU does not hold.
    """
    running, first, failed = {}, {}, dict[str, None]()
    for name, make in makers.items():
        start, steps = time.perf_counter(), make()
        try:
            next(steps)
            finish(device)
            first[name] = time.perf_counter() - start
            for _ in range(2):
                next(steps)
        except torch.OutOfMemoryError:
            print(name, "is out of memory", flush=True)
            failed[name] = None
        else:
            running[name] = steps
        del steps
        if device.type == "cuda":
            torch.cuda.empty_cache()
    speeds: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        for name, steps in running.items():
            speeds[name].append(turn(steps, seconds, batch, device))
        print(number + 1, *(f"{name} {values[-1]:.1f}" for name, values in speeds.items()), sep="  ", flush=True)
    return failed | {
        name: {
            "images_per_second": spread(values),
            "diffkit_ratio": spread([ours / theirs for ours, theirs in zip(speeds["diffkit"], values, strict=True)]),
            "first_step_seconds": round(first[name], 2),
        }
        for name, values in speeds.items()
    }


def operations(network: nn.Module, size: int) -> int:
    """Floating point operations of one image's forward pass."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, size, size), torch.zeros(1))
    return int(counter.get_total_flops())


def table(results: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md; ratios are diffkit's speed over the trainer's, round by round."""
    lines = []
    for network in results["networks"]:
        name, size, batch, flop = (network[key] for key in ("name", "size", "batch", "forward_flop"))
        lines += [
            f"{name} at {size}x{size}, batch {batch}, {network['parameters'] / 1e6:.1f} million parameters, "
            f"{flop / 1e9:.2f} GFLOP forward; diffkit in {results['precision']}:",
            "",
            "| trainer | images a second | share of peak | of the roofline | diffkit is faster by | first step |",
            "|---|---|---|---|---|---|",
        ]
        for trainer, figures in network["trainers"].items():
            if figures is None:
                lines.append(f"| {trainer} | out of memory | | | | |")
                continue
            speed, ratio = figures["images_per_second"], figures["diffkit_ratio"]
            shares = f"{figures['share_of_peak']:.0%} | {figures['share_of_roofline']:.0%}"
            lines.append(
                f"| {trainer} | {speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f}) "
                f"| {shares} | {ratio['median']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f}) "
                f"| {figures['first_step_seconds']:.1f} s |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def main() -> None:
    options = asked(rounds=5, seconds=6.0)
    device, size, batch = options.device, options.size, options.batch

    trial = diffusers_network(size, options.large).to(device)
    x, c_noise = torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, device=device)
    half = choose_precision("auto", device, lambda: trial(x, c_noise).sample)
    trial.cpu()
    best, traffic = peak(device, half), bandwidth(device)

    def measured(make: Callable[[], Leg]) -> dict[str, Any]:
        leg = make()
        count = operations(leg.network, leg.size)
        print(f"{leg.name}: {count / 1e9:.2f} GFLOP forward, peak {best / 1e12:.2f} TFLOP/s, {half}")
        found = compete(leg.trainers, options.rounds, options.seconds, leg.batch, device)
        most = roofline(leg.network, leg.size, best, traffic)
        for each in filter(None, found.values()):
            each["share_of_peak"] = round(each["images_per_second"]["median"] * 3 * count / best, 4)
            each["share_of_roofline"] = round(each["images_per_second"]["median"] / most, 4)
        parameters = sum(parameter.numel() for parameter in leg.network.parameters())
        about = {"name": leg.name, "size": leg.size, "batch": leg.batch, "parameters": parameters}
        return {**about, "forward_flop": count, "trainers": found}

    name = f"training-{kind(device)}"
    before = begun(name, device, options.resume).get("networks", [])
    networks = {unit(each["name"], each["size"], each["batch"]): each for each in before}

    def keep() -> None:
        figures = {"precision": half, "peak_flops": best, "bytes_a_second": traffic}
        write(name, {**figures, "networks": list(networks.values())}, device)
        show("training", device, table, kind(device))

    with scratch(options) as folder:
        makers = legs(folder, size, batch, device, half)
        units(networks, {each: partial(measured, make) for each, make in makers.items()}, keep)


if __name__ == "__main__":
    main()
