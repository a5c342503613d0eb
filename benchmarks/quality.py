"""Distance to the real images against training time: diffkit, its classic network, and diffusers' example.

    python benchmarks/quality.py DATA [--minutes 5] [--seed 0] [--device cuda] [--resume]

DATA: a prepared set. Each contestant trains alone on its images for that long, without classes; its clock stands while
samples are made and measured. diffkit chooses network, batch, learning rate and precision as `diffkit train` does.
diffusers trains its UNet2DModel as in `training.py`. All sample with diffkit's default sampler and calls, by the
averaged weights, or by the weights themselves where the peer keeps no average. Kernel distance of the features of
lite0. Each run adds its seed to results/quality-DEVICE.json, and the table is made of all that are there.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import DOCS, asked, begun, kept, only_steps, place, show, units, write
from PIL import Image
from torch import Tensor, nn
from training import diffusers_network

import peers
from diffkit.compose.start import prepare_training
from diffkit.compose.training import Training
from diffkit.core.denoiser import Denoiser
from diffkit.core.predictions import eps
from diffkit.core.samplers.multistep import deis
from diffkit.core.schedules import karras, over_range, sampling_grid
from diffkit.engine.devices import finish
from diffkit.engine.sample import Plan, sample
from diffkit.engine.store import Store
from diffkit.extractors.lite0 import lite0
from diffkit.interfaces import ImageSpec
from diffkit.measure.kernel import kernel_distance
from diffkit.rundir import RunDir

FILES, REAL, SAMPLES, CALLS = 10_000, 5_000, 500, 15
POINTS = (1 / 30, 1 / 15, 2 / 15, 4 / 15, 8 / 15, 1.0)
"""Shares of the time after which diffkit is measured; the others, slow to sample, are measured at the end."""


@dataclass
class Contestant:
    """`steps` trains; `denoiser` is what is to be sampled from, as it is now; `batch`: images of a step."""

    steps: Iterator[object]
    denoiser: Callable[[], Denoiser]
    batch: int
    points: tuple[float, ...]
    network: str


class UnlabelledStore(Store):
    """A prepared set, its classes forgotten, gray in three channels."""

    @classmethod
    def open(cls, path: str | Path) -> UnlabelledStore:
        store = super().open(path)
        assert isinstance(store, UnlabelledStore)
        store.spec = replace(store.spec, classes=(), attributes=(), channels=3)
        store.mean = (store.mean * 3)[:3]
        return store

    def column(self, kind: str, indices: Any, part: str = "train") -> Any:
        found = super().column(kind, indices, part)
        return np.repeat(found, 3, axis=-1) if kind == "images" and found.shape[-1] == 1 else found

    def gather(self, indices: Any, part: str = "train") -> Any:
        return self.column("images", indices, part), None


class Timed(nn.Module):
    """diffusers' network as diffkit calls one: at the step of linear betas, of 1,000, whose noise is as strong."""

    levels: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
        self.register_buffer("levels", ((1 - kept) / kept).sqrt().log().float() / 4)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        above = torch.searchsorted(self.levels, c_noise.contiguous()).clamp(1, 999)
        low, high = self.levels[above - 1], self.levels[above]
        times = (above - 1 + (c_noise - low) / (high - low)).clamp(0, 999)
        answer: Tensor = self.network(x, times).sample
        return answer


def ours(store: Store, seed: int, device: torch.device, backbone: str, points: tuple[float, ...]) -> Contestant:
    """`diffkit train` with its defaults."""
    given = {"backbone": {"name": backbone}, "train": {"seed": seed}, "data": {"path": str(store.path)}}
    training: Training = prepare_training(given, store, RunDir(Path("/dev/null")), str(device))
    train_settings = training.settings.train

    parameters = sum(p.numel() for p in training.state.network.parameters())
    return Contestant(
        only_steps(training.steps(report_every=training.report_every)),
        lambda: replace(training.denoiser, network=training.state.average),
        training.recipe.batch_size,
        points,
        f"{parameters / 1e6:.1f}M parameters, batch {train_settings.batch_size}, {train_settings.precision}",
    )


def theirs(leg: str, folder: Path, size: int, batch: int, seed: int, device: torch.device) -> Contestant:
    """The example's loop, see `peers`."""
    large = device.type == "cuda"
    network = diffusers_network(size, large)
    torch.manual_seed(seed)
    steps = peers.alone(peers.diffusers(leg, network, folder, size, batch, device))
    parameters = sum(p.numel() for p in network.parameters())
    precision = "float32" if leg == "stock" else "bfloat16"

    def denoiser() -> Denoiser:
        return Denoiser(Timed(network).to(device).eval(), eps, partial(torch.autocast, device.type, torch.bfloat16))

    return Contestant(steps, denoiser, batch, (1.0,), f"{parameters / 1e6:.1f}M parameters, batch {batch}, {precision}")


def files(store: Store, folder: Path) -> None:
    """Some of the images as PNG files, for the peers."""
    for start in range(0, min(FILES, store.count), 500):
        indices = np.arange(start, min(start + 500, FILES, store.count)) * store.count // min(FILES, store.count)
        for index, pixels in zip(indices, store.gather(indices)[0], strict=True):
            Image.fromarray(pixels).save(folder / f"{index:06d}.png")


class Judge:
    """Kernel distance between samples and some of the real images."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device, self.network = store, device, lite0().to(device)
        count = min(REAL, store.count)
        self.real = self.features(store.gather(np.arange(count) * store.count // count)[0])

    def features(self, pixels: Any) -> Tensor:
        found = []
        for start in range(0, len(pixels), 64):
            piece = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 64])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                found.append(self.network(piece.expand(-1, 3, -1, -1).to(self.device)).cpu())
        return torch.cat(found)

    def __call__(self, denoiser: Denoiser, spec: ImageSpec) -> dict[str, float]:
        top = 80 * math.sqrt(spec.height * spec.width) / 32
        plan = Plan(deis, sampling_grid(over_range(karras, 0.002, top), CALLS), self.store.mean, seed=1)
        made = [each.pixels for each in sample(denoiser, spec, plan, range(SAMPLES), batch_size=100)]
        found = kernel_distance("KD-lite0", self.features(np.concatenate(made)), self.real)
        assert found.low is not None and found.high is not None
        return {"distance": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def measured(contestant: Contestant, seconds: float, judge: Judge, spec: ImageSpec, device: torch.device) -> Any:
    """Train for that long, measured along the way, after a step that does not count: the first may compile."""
    next(contestant.steps)
    finish(device)
    busy, images, curve = 0.0, contestant.batch, []
    for share in contestant.points:
        while busy < share * seconds:
            start = time.perf_counter()
            next(contestant.steps)
            finish(device)
            busy += time.perf_counter() - start
            images += contestant.batch
        curve.append({"seconds": round(busy, 2), "images": images, **judge(contestant.denoiser(), spec)})
        print("  ", curve[-1], flush=True)
    return {"network": contestant.network, "curve": curve}


def seconds_to(curve: list[dict[str, float]], distance: float) -> float:
    """When the curve fell to this distance, between its points by the logarithm of time; infinite if it never did."""
    before = None
    for point in curve:
        if point["distance"] <= distance:
            if before is None:
                return point["seconds"]
            share = (before["distance"] - distance) / (before["distance"] - point["distance"])
            return float(before["seconds"] * (point["seconds"] / before["seconds"]) ** share)
        before = point
    return math.inf


def table(results: dict[str, Any]) -> str:
    """The rows of docs/benchmarks.md: means over the seeds."""
    runs = results["runs"]
    names = list(runs[0]["contestants"])
    seconds, seeds = runs[0]["seconds"], len(runs)
    many = f"{seeds} seeds" if seeds > 1 else "one seed"
    lines = [
        f"{results['size']}x{results['size']}, {seconds / 60:g} minutes each, {many}:",
        "",
        "| trainer | network | images seen | distance at the end | diffkit is there after | share of the time |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        those = [run["contestants"] for run in runs if name in run["contestants"]]
        ends = [each[name]["curve"][-1] for each in those]
        distances = [end["distance"] for end in ends]
        reached = [seconds_to(each["diffkit"]["curve"], far) for each, far in zip(those, distances, strict=True)]
        first = [each["diffkit"]["curve"][0]["seconds"] for each in those]
        words = "at most " if all(after <= point for after, point in zip(reached, first, strict=True)) else ""
        between = f" ({min(distances):.3f} to {max(distances):.3f})" if seeds > 1 else ""
        images = sum(end["images"] for end in ends) / len(ends)
        after = sum(reached) / len(reached)
        lines.append(
            f"| {name} | {those[0][name]['network']} | {images:,.0f} | {sum(distances) / len(distances):.3f}{between} "
            f"| {words}{after:.0f} s | {words}{after / seconds:.2f} |"
        )
    return "\n".join([*lines, "", f"![distance over time](images/{results.get('plot', 'quality-cpu.png')})"])


def plot(results: dict[str, Any], path: Path) -> None:
    """Distance over training time: curves where there are points along the way, else a dot at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, name in enumerate(results["runs"][0]["contestants"]):
        for run in results["runs"]:
            curve = run["contestants"][name]["curve"]
            times, values = ([point[key] for point in curve] for key in ("seconds", "distance"))
            bars = [[point["distance"] - point["low"] for point in curve], [p["high"] - p["distance"] for p in curve]]
            label = name if run is results["runs"][0] else None
            axes.errorbar(times, values, bars, marker="o", ms=4, lw=1.6, capsize=2, color=f"C{number}", label=label)
    axes.set_xscale("log")
    end = results["runs"][0]["seconds"]
    ticks = [round(share * end) for share in POINTS]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"KD-lite0 of {results['samples']:,} samples")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    options = asked(data=True, minutes=0.0, seed=0)
    device, batch = options.device, options.batch
    seconds = 60 * (options.minutes or (4 if options.large else 5))
    store = UnlabelledStore.open(options.data)
    judge = Judge(store, device)
    file = f"quality-{place(device)}"

    about = {"seed": options.seed, "seconds": seconds}
    before = begun(file, device, options.resume).get("runs", [])
    run = next((each for each in before if about.items() <= each.items()), {**about, "contestants": {}})

    def keep() -> None:
        runs = [each for each in kept(file).get("runs", []) if each["seed"] != options.seed] + [run]
        figures = {"size": store.spec.height, "samples": SAMPLES, "calls": CALLS, "plot": f"{file}.png", "runs": runs}
        write(file, figures, device)
        plot(kept(file), DOCS / "images" / f"{file}.png")
        show("quality", device, table, place(device))

    def contest(make: Callable[[], Contestant]) -> Any:
        return measured(make(), seconds, judge, store.spec, device)

    with tempfile.TemporaryDirectory() as temporary:
        files(store, Path(temporary))
        rest = (Path(temporary), store.spec.height, batch, options.seed, device)
        makers: dict[str, Callable[[], Contestant]] = {
            "diffkit": lambda: ours(store, options.seed, device, "unet", POINTS),
            "diffkit, unet-classic": lambda: ours(store, options.seed, device, "unet-classic", (1.0,)),
            "diffusers stock": lambda: theirs("stock", *rest),
            "diffusers tuned": lambda: theirs("tuned", *rest),
        }
        units(run["contestants"], {name: partial(contest, make) for name, make in makers.items()}, keep)


if __name__ == "__main__":
    main()
