"""`diffkit ema`: averages of the weights of any length, after training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffkit.cli.options import Against, Count, Data, Device, Extractor, Metric, Precision, Seed

if TYPE_CHECKING:
    from diffkit.engine.snapshots import Averaged
    from diffkit.rundir import RunDir

COUNT = 256


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run that was begun with --ema-snapshots.")],
    length: Annotated[float | None, typer.Option(help="Write the model of this relative length, such as 0.08.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="MODEL", help="Where; by default RUN/ema-LENGTH.safetensors.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="A..B", help="Measure lengths from A to B, such as 0.02..0.25.")
    ] = None,
    points: Annotated[int, typer.Option(min=2, max=1000, help="How many lengths a sweep has.")] = 6,
    metric: Metric = "kid",
    data: Data = None,
    against: Against = "all",
    extractor: Extractor = "lite0",
    count: Count = COUNT,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Average a finished run's weights over any length, and find the best one.

    The length is the deviation of the averaging window over the whole training (sigma_rel of Karras et al. 2024).
    """
    from diffkit.cli.console import chosen_among
    from diffkit.compose.reference import AGAINST
    from diffkit.errors import DiffkitError, ExitCode
    from diffkit.measure.scores import METRICS
    from diffkit.rundir import RunDir

    if (length is None) == (sweep is None):
        raise DiffkitError("Say which average to make.", "Give --length 0.08, or --sweep 0.02..0.25 to find the best.")
    chosen_among("--against", against, AGAINST)
    chosen_among("--metric", metric, METRICS)
    place = RunDir(run)
    if not place.exists:
        raise DiffkitError(f"{run} is not a run.", "Name the folder that diffkit train wrote.", code=ExitCode.MODEL)
    if length is not None:
        _write(place, length, out)
        return
    lengths = _lengths(sweep or "", points)
    _sweep(place, lengths, metric, data, against, extractor, count, seed, device, precision)


def _write(run: RunDir, length: float, out: Path | None) -> None:
    from diffkit import paths
    from diffkit.cli.console import make_parent, next_command, plain, say
    from diffkit.engine.modelfile import write_tensors
    from diffkit.engine.snapshots import averaged
    from diffkit.errors import DiffkitError

    target = out or run.path / f"ema-{length:g}.safetensors"
    if out is not None and paths.exists(out):
        raise DiffkitError(f"{out} already exists.", "Nothing is overwritten; choose another place with -o.")
    (made,) = averaged(run.snapshots, [length])
    make_parent(target)
    write_tensors(target, made.tensors, made.header)
    say(f"[bold]{plain(str(target))}[/]: length {length:g} at {made.header['images_seen']:,} images")
    say(f"The averaging window is met within {made.error:.2%}{_caution(made)}.")
    next_command("sample", target)


def _sweep(
    run: RunDir,
    lengths: list[float],
    metric: str,
    data: Path | None,
    against: str,
    extractor: str,
    count: int,
    seed: int,
    device: str,
    precision: str,
) -> None:
    from rich.table import Table

    from diffkit.cli.console import clock, drawn, figure, interval, next_command, plain, say
    from diffkit.cli.console import out as console
    from diffkit.compose import model_of
    from diffkit.compose.comparison import Way, compare
    from diffkit.compose.reference import Reference
    from diffkit.engine.snapshots import averaged

    made = averaged(run.snapshots, lengths)
    models = [model_of(each.tensors, each.header, run.model, device=device, precision=precision) for each in made]
    reference = Reference.of(models[0], data, extractor)
    asked = [Way(model, {"length": each.length}) for model, each in zip(models, made, strict=True)]
    found = drawn(compare(reference, against, metric, asked, count, seed))
    best = min(found, key=lambda each: each.metric.value)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("length", found[0].metric.name, "95 % interval", "window met within", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each, average in zip(found, made, strict=True):
        mark = "[bold green]best[/]" if each is best else ""
        figures = [figure(each.metric.value), interval(each.metric), f"{average.error:.2%}", clock(each.seconds)]
        table.add_row(f"{average.length:.3f}", *figures, mark)
    console.print(table)
    if reference.note:
        say(f"[yellow]{plain(reference.note)}[/]")
    next_command("ema", run.path, "--length", f"{best.settings['length']:.3f}")


def _caution(made: Averaged) -> str:
    return ": too far off to be of use; keep more snapshots" if made.error > 0.1 else ""


def _lengths(text: str, points: int) -> list[float]:
    """ "0.02..0.25" -> evenly spaced in the logarithm, to three decimals."""
    from diffkit.errors import DiffkitError

    try:
        low, high = (float(part) for part in text.split(".."))
    except ValueError:
        low = high = 0.0
    if not 0 < low < high:
        raise DiffkitError(f"--sweep {text} is no range of lengths.", "Write --sweep 0.02..0.25.")
    ratio = math.log(high / low) / (points - 1)
    return list(dict.fromkeys(round(low * math.exp(ratio * number), 3) for number in range(points)))
