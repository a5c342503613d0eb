"""`diffkit demo`: the whole way on a small real image set, as a user would go it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="New folder for everything it makes; by default demo.")
    ] = None,
    seconds: Annotated[
        int | None, typer.Option("--seconds", min=1, max=10**6, help="How long to train; by default 150, on a GPU 40.")
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", min=10, max=10**6, help="Samples to judge.")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """Prepare, train and sample on real handwritten digits, then judge the result. Five minutes on two cores."""
    from diffkit import durable
    from diffkit.cli.console import clock, plain, require_vacant, say
    from diffkit.datasets.demo import write_demo_images
    from diffkit.engine.devices import choose_device
    from diffkit.measure.recognition import recognise
    from diffkit.rundir import unused

    out = out or unused(Path("demo"))
    seconds = seconds or (150 if choose_device(device).type == "cpu" else 40)
    require_vacant(out)
    begun = time.monotonic()
    counts = write_demo_images(out / "images")
    say(f"{sum(counts.values()):,} real handwritten digits as PNG files in [bold]{plain(str(out / 'images'))}[/].\n")
    data, run, samples = out / "data", out / "run", out / "samples"
    _run("prepare", out / "images", "-o", data, "--size", "16", "--color", "gray", "--holdout", "20%")
    _run("train", data, "-o", run, "--time", f"{seconds}s", "--no-flip", "--device", device)
    _run("sample", run, "-o", samples, "-n", str(count), "--guidance", "1.5", "--device", device)
    figures = recognise(data, samples, out / "nearest.png")
    durable.write_json(out / "figures.json", figures)
    say("\nAn independent classifier, trained on the real training images only, recognises")
    say(f"  {figures['recognised_real']:.1%} of {figures['held_out']:,} held-out real images, and")
    say(f"  [bold green]{figures['recognised']:.1%}[/] of {figures['samples']:,} samples as the digit asked for.")
    say("Median distance to the nearest training image (a copy would be at 0):")
    say(f"  samples {figures['distance']:.3f}, held-out real images {figures['distance_real']:.3f}")
    say(
        f"\nSamples: [bold]{plain(str(samples / 'grid.png'))}[/]; with the nearest training image below each: "
        f"[bold]{plain(str(out / 'nearest.png'))}[/]"
    )
    say(f"All of it took {clock(time.monotonic() - begun)}.")


def _run(*arguments: str | Path) -> None:
    """Print a command and run it in a process of its own; its failure is ours."""
    import subprocess
    import sys

    from diffkit import names
    from diffkit.cli.console import plain, say

    say(f"[bold]$ {plain(names.command(*arguments))}[/]")
    process = subprocess.Popen([sys.executable, "-m", "diffkit", *map(names.argument, arguments)])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:
            continue  # the command has had it too, and is saving
    if code:
        raise typer.Exit(code)
    say()
