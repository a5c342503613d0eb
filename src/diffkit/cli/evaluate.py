"""`diffkit evaluate`: how near to the real images are those of a model, or of any folder?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit import durable
from diffkit.cli.options import (
    MEASURE,
    MOST_IMAGES,
    MOST_STEPS,
    PART,
    Against,
    AsJson,
    Data,
    Device,
    Extractor,
    Gpus,
    Precision,
    Seed,
)

if TYPE_CHECKING:
    from diffkit.compose.evaluation import Evaluation
    from diffkit.compose.model import Model
    from diffkit.compose.reference import Reference
    from diffkit.measure.images import ImageSet

HOW = "How a model samples"


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, a model, or a folder of images.")],
    data: Data = None,
    against: Against = "all",
    extractor: Extractor = "lite0",
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also class by class.", rich_help_panel=MEASURE)
    ] = False,
    downstream: Annotated[
        bool,
        typer.Option("--downstream", help="Also train classifiers: real, samples, both.", rich_help_panel=MEASURE),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="New folder for evaluation.json and nearest.png.", rich_help_panel=MEASURE),
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, max=MOST_IMAGES, help="Samples to make.", rich_help_panel=HOW)
    ] = None,
    sampler: Annotated[str | None, typer.Option(metavar=PART, rich_help_panel=HOW)] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MOST_STEPS, rich_help_panel=HOW)] = None,
    scheduler: Annotated[str | None, typer.Option(metavar=PART, rich_help_panel=HOW)] = None,
    guidance: Annotated[float | None, typer.Option(rich_help_panel=HOW)] = None,
    seed: Seed = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Weights without averaging.", rich_help_panel=HOW)] = False,
    device: Device = "auto",
    gpus: Gpus = 1,
    precision: Precision = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure quality, and whether the model copies, with 95 % intervals.

    Frechet distance, KID, precision, recall, density and coverage, beside what real images get among themselves.
    A run's figures are also kept in its folder.
    """
    from dataclasses import replace

    from diffkit.cli.console import chosen_among, drawn, plain, print_json, require_vacant, say
    from diffkit.cli.launch import launch, launched
    from diffkit.compose import load_model
    from diffkit.compose.evaluation import evaluate as measured
    from diffkit.compose.evaluation import is_model, use_as_data
    from diffkit.compose.reference import AGAINST, Reference
    from diffkit.engine.devices import choose_device
    from diffkit.engine.distributed import joined
    from diffkit.measure.images import open_images
    from diffkit.rundir import RunDir

    chosen_among("--against", against, AGAINST)
    if gpus > 1 and not launched():
        launch(gpus, device)
    with joined(device) as world:
        if out is not None:
            require_vacant(out)
        world.wait()  # until all have seen that it is vacant
        choices = {"sampler": sampler, "scheduler": scheduler, "steps": steps, "guidance": guidance, "seed": seed}
        if is_model(target):
            loaded = load_model(target, device=device, precision=precision, raw=raw)
            model = replace(loaded, world=world)
            reference, images, how = _of_model(model, target, data, extractor, against, count, choices)
            how["raw"] = raw
        else:
            reference = Reference(_named(data), extractor, choose_device(device), world=world)
            images, how = open_images(target)[0], {}
        result = drawn(measured(reference, images, against, per_class=per_class))
    if not world.leads:
        return
    if downstream:
        result.downstream = drawn(use_as_data(reference, images))
    run = RunDir(target) if RunDir(target).exists else None
    if as_json:
        print_json({**how, **result.to_dict()})
    else:
        _show(result)
    if picture := _keep(result, how, run, out):
        say(f"Nearest training images: [bold]{plain(str(picture))}[/]")


def _of_model(
    model: Model,
    path: Path,
    data: Path | None,
    extractor: str,
    against: str,
    count: int | None,
    choices: dict[str, Any],
) -> tuple[Reference, ImageSet, dict[str, Any]]:
    """The real images, those that the model makes, and how it made them."""
    from diffkit.cli.console import drawn
    from diffkit.compose.evaluation import SAMPLES
    from diffkit.compose.reference import Reference
    from diffkit.compose.sampled import sampled

    plan = model.plan(**choices)
    reference = Reference.of(model, data, extractor)
    reference.check_part(against)
    reference.check_fits(model)
    wanted = count or min(SAMPLES, max(reference.train.count, 100))
    made = drawn(sampled(model, plan, wanted, reference.labels(against)))
    how = {**plan.names, "guidance": plan.guidance.scale, "seed": plan.seed, "model": model.sha256}
    how |= {"images_seen": model.images_seen, "network_calls": made.calls, "seconds": round(made.seconds, 3)}
    return reference, made.images, how


def _named(data: Path | None) -> Path:
    from diffkit.errors import DiffkitError

    if data is None:
        raise DiffkitError("A folder of images is compared with real images.", "Name them: --data DATA_OR_FOLDER.")
    return data


def _keep(result: Evaluation, how: dict[str, Any], run: Any, out: Path | None) -> Path | None:
    """Write the figures and the picture: into the folder asked for, and beside the run that they are about.

    A run that may only be read is left as it is. Returns where the picture is, if it was written.
    """
    import time

    from diffkit.cli.console import plain, say
    from diffkit.errors import DiffkitError
    from diffkit.rundir import unused

    record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **how, **result.to_dict()}
    picture = None if out is None else _written(out, record, result)
    if run is None:
        return picture
    try:
        if picture is None:
            picture = _written(unused(run.path / "evaluations" / f"images-{how['images_seen']:012d}"), record, result)
        inside = picture.is_relative_to(run.path)
        shown = picture.relative_to(run.path).as_posix() if inside else str(picture.resolve())
        durable.append_line(run.evaluations, {**record, "nearest": shown})
    except DiffkitError as error:
        say(f"[yellow]Not kept in {plain(str(run.path))}:[/] {plain(error.message)}")
    return picture


def _written(folder: Path, record: dict[str, Any], result: Evaluation) -> Path:
    """A folder with the figures and the picture; returns the picture's path."""
    from diffkit.engine.pictures import save_png

    assert result.picture is not None
    durable.make_folders(folder)
    save_png(folder / "nearest.png", result.picture)
    durable.write_json(folder / "evaluation.json", record)
    return folder / "nearest.png"


def _show(result: Evaluation) -> None:
    from rich.table import Table

    from diffkit.cli.console import figure, interval, out, plain, say

    reference = result.reference
    say(
        f"[bold]{result.samples:,}[/] images against [bold]{reference['images']:,}[/] real ones "
        f"({plain(reference['part'])} of {plain(reference['path'])}), features {plain(result.extractor)}"
    )
    floor = {each.name: each for each in result.floor}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure", no_wrap=True)
    for name in ("value", "95 % interval", "real/real"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", style="dim")
    groups = {"": result.metrics, **result.classes}
    for label, found in groups.items():
        if label:
            table.add_section()
            table.add_row(f"[bold]{plain(label)}[/]")
        for each in found:
            real = floor.get(each.name) if not label else None
            table.add_row(each.name, figure(each.value), interval(each), figure(real.value) if real else "", each.note)
    out.print(table)
    for note in result.notes:
        say(f"[yellow]{plain(note)}[/]")
    _show_copying(result)
    _show_downstream(result)


def _show_copying(result: Evaluation) -> None:
    from diffkit.cli.console import interval, say

    copying = result.copying
    if copying is None:
        return
    text = f"Copies: {copying.rate.value:.1%} of the images ({interval(copying.rate, percent=True)}) are nearer to a"
    text += " training image than real images are to one another"
    if copying.baseline is not None:
        text += f"; of held-out real images {copying.baseline.value:.1%} ({interval(copying.baseline, percent=True)})"
    say(f"[bold red]{text}. The model repeats what it was trained on.[/]" if copying.alarm else f"{text}.")


def _show_downstream(result: Evaluation) -> None:
    from rich.table import Table

    from diffkit.cli.console import interval, out, plain

    found = result.downstream
    if found is None:
        return
    gains = {each.name: each for each in found.gain}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("classifier trained on", no_wrap=True)
    for name in ("accuracy", "95 % interval", "gain", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found.accuracy:
        gain = gains.get(each.name)
        more = [f"{gain.value:+.1%}", interval(gain, percent=True)] if gain else ["", ""]
        table.add_row(plain(each.name), f"{each.value:.1%}", interval(each, percent=True), *more)
    out.print("", table)
    out.print(f"Tested on {found.tested:,} held-out images.", highlight=False)
