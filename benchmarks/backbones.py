"""Kinds of U-Net at equal training time: how near to the real images does each come?

    python benchmarks/backbones.py DATA [--seconds 100] [--seed 0] [--device cuda] [--resume]

Speeds are measured first, in turns, on an otherwise idle machine. Then each is trained on as many images as it gets
through in that time, so that the result depends on the speeds and the seed alone. Recorded: the training loss over the
last tenth, and the kernel distance of samples (see `quality.py`). Writes results/backbones-DEVICE.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import asked, begun, place, show, spread, units, write
from quality import Judge, UnlabelledStore

from diffkit.backbones.presets import unet_preset
from diffkit.compose.start import prepare_training
from diffkit.compose.training import Training
from diffkit.engine.train import Progress
from diffkit.rundir import RunDir

ROUNDS, TURN, LAST = 5, 3.0, 0.1


def variants(lean: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Backbone and options by a name; `lean` is the preset's."""
    fuller = {**lean, "resample": "conv", "skips": "concat"}
    shorter = {**fuller, "multipliers": lean["multipliers"][:-1]}
    return {
        "unet (the default)": ("unet", lean),
        "skips put beside": ("unet", {**lean, "skips": "concat"}),
        "and convolutions between": ("unet", fuller),
        "and without the lowest stage": ("unet", shorter),
        "unet-classic": ("unet-classic", {}),
    }


def made(store: UnlabelledStore, backbone: str, options: dict[str, Any], seed: int, device: torch.device) -> Training:
    choice = {"name": backbone, "options": options}
    given = {
        "backbone": choice,
        "train": {"seed": seed, "compile": "off", "cuda_graphs": False},
        "data": {"path": str(store.path)},
    }
    return prepare_training(given, store, RunDir(Path("/dev/null")), str(device))


def trained(training: Training, images: int | None, stop: Callable[[], bool]) -> tuple[list[float], int]:
    """Losses by step, until so many images have been seen, or `stop`."""
    losses, seen = [], training.state.images_seen
    for step in training.steps(images):
        if isinstance(step, Progress) and step.loss is not None:
            losses.append(step.loss)
        if stop():
            break
    return losses, training.state.images_seen - seen


def speeds(trainings: dict[str, Training]) -> dict[str, list[float]]:
    """Images a second, in turns."""
    found: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(ROUNDS + 1):
        for name, training in trainings.items():
            start = time.perf_counter()
            _, images = trained(training, None, lambda start=start: time.perf_counter() - start > TURN)  # type: ignore[misc]
            found[name].append(images / (time.perf_counter() - start))
    return {name: values[1:] for name, values in found.items()}  # the first round warms up


def table(results: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md."""
    lines = [
        f"{results['size']}x{results['size']}, {results['seconds']:g} seconds each:",
        "",
        "| network | parameters | images a second | images seen | loss | distance | 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in results["networks"].items():
        speed, distance = each["images_per_second"]["median"], f"{each['low']:.3f} to {each['high']:.3f}"
        lines.append(
            f"| {name} | {each['parameters'] / 1e6:.1f}M | {speed:.0f} | {each['images']:,} "
            f"| {each['loss']:.4f} | {each['distance']:.3f} | {distance} |"
        )
    return "\n".join(lines)


def main() -> None:
    options = asked(data=True, seconds=100.0, seed=0)
    device = options.device
    store = UnlabelledStore.open(options.data)
    judge = Judge(store, device)
    kinds = variants(unet_preset("tiny" if device.type == "cpu" else "base", store.spec))
    file = f"backbones-{place(device)}"
    results = begun(file, device, options.resume)
    results |= {"size": store.spec.height, "seconds": options.seconds, "seed": options.seed}
    rates = results.setdefault("rates", {})
    if not rates:
        rates |= speeds({name: made(store, *kind, options.seed, device) for name, kind in kinds.items()})

    def measured(name: str) -> dict[str, Any]:
        training = made(store, *kinds[name], options.seed, device)
        rate = spread(rates[name])
        batch = training.recipe.batch_size
        images = int(rate["median"] * options.seconds / batch) * batch
        losses, _ = trained(training, images, lambda: False)
        last = losses[-max(1, int(LAST * len(losses))) :]
        figures = {
            "parameters": sum(p.numel() for p in training.state.network.parameters()),
            "images_per_second": rate,
            "images": images,
            "loss": round(sum(last) / len(last), 5),
            **judge(replace(training.denoiser, network=training.state.average), store.spec),
        }
        print(name, figures, flush=True)
        return figures

    def keep() -> None:
        write(file, results, device)
        show("backbones", device, table, place(device))

    units(results.setdefault("networks", {}), {name: partial(measured, name) for name in kinds}, keep)


if __name__ == "__main__":
    main()
