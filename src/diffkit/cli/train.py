"""`diffkit train`: a prepared data set -> a run with a model."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from diffkit.compose import Training
    from diffkit.engine.session import Cadence
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir

PART = "NAME[:KEY=VALUE,...]"
LENGTH, MODEL, DATA, MACHINE = "Length and output", "Model", "Data", "Machine"


def train(
    data: Annotated[Path, typer.Argument(help="A data set made by diffkit prepare.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The run's folder; by default runs/DATA.", rich_help_panel=LENGTH)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps in all.", rich_help_panel=LENGTH)] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the data in all.", rich_help_panel=LENGTH)
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Stop after 90s, 30m, 2h.", rich_help_panel=LENGTH)
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(min=0, metavar="IMAGES", help="Images between sample grids; 0 = none.", rich_help_panel=LENGTH),
    ] = None,
    validate_every: Annotated[
        int,
        typer.Option(
            min=0, metavar="IMAGES", help="Images between looks at held-out ones; 0 = none.", rich_help_panel=LENGTH
        ),
    ] = 5_000,
    stop_when: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Also stop when memorizing, or at a plateau.", rich_help_panel=LENGTH),
    ] = None,
    save_every: Annotated[
        str, typer.Option(metavar="DURATION", help="Time between checkpoints.", rich_help_panel=LENGTH)
    ] = "10m",
    scheduler: Annotated[str | None, typer.Option(metavar=PART, help="Noise schedule.", rich_help_panel=MODEL)] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar=PART, help="eps, x0, v, flow, edm.", rich_help_panel=MODEL)
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar=PART, help="Network.", rich_help_panel=MODEL)] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of the network: tiny, small, base, large.", rich_help_panel=MODEL)
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(metavar="RUN_OR_MODEL", help="Start from this model's weights.", rich_help_panel=MODEL),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Train on random crops of this size.", rich_help_panel=DATA)] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror half of the images; off for text.", rich_help_panel=DATA),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, rich_help_panel=MODEL)] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass; gradients add up.", rich_help_panel=MACHINE)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=MODEL)] = None,
    ema_snapshots: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Keep N snapshots for diffkit ema; 0 = none.", rich_help_panel=MODEL),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, rich_help_panel=MODEL)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=MACHINE)] = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=MACHINE)] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in TOML; options override it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as train.clip=0.5.")
    ] = None,
) -> None:
    """Train a model. The same command again goes on where it stopped.

    Ctrl-C saves and stops. Without --steps, --epochs or --time it trains for a length that suits the data.
    """
    from diffkit.cli.console import duration
    from diffkit.config import Settings, put, put_part, read_toml, set_from_text
    from diffkit.engine.store import Store
    from diffkit.errors import DiffkitError

    if steps is not None and epochs is not None:
        raise DiffkitError("--steps and --epochs both say how long to train.", "Give one of them.")
    if epochs is not None and not 0 < epochs < float("inf"):
        raise DiffkitError(f"--epochs {epochs} is no length.", "Give a number above 0.")
    given: dict[str, Any] = read_toml(config) if config else {}
    for key, text in (("scheduler", scheduler), ("prediction", prediction), ("backbone", backbone)):
        if text is not None:
            put_part(given, key, text, Settings.model_fields[key].default.name)
    flags = {
        "preset": preset,
        "data.size": _size(size),
        "data.flip": flip,
        "train.batch_size": batch_size,
        "train.micro_batch": micro_batch,
        "train.lr": lr,
        "train.ema_snapshots": ema_snapshots,
        "train.seed": seed,
        "train.precision": precision,
        "train.init": init,
    }
    for key, value in flags.items():
        if value is not None:
            put(given, key, value)
    for assignment in settings or []:
        set_from_text(given, assignment)
    put(given, "data.path", str(data))
    length = {"steps": steps, "epochs": epochs, "seconds": duration(time) if time else None}
    store = Store.open(data)
    _check_rule(stop_when, validate_every, store)
    run = _run_dir(out, data, given, store)
    _train(given, store, run, device, length, preview_every, duration(save_every), validate_every, stop_when)


def _check_rule(rule: str | None, validate_every: int, store: Store) -> None:
    from diffkit.cli.console import chosen_among
    from diffkit.errors import DiffkitError, ExitCode

    if rule is None:
        return
    chosen_among("--stop-when", rule, ["memorizing", "plateau"])
    if not store.holdout_count:
        raise DiffkitError(
            f"--stop-when {rule} looks at held-out images, and {store.path} has none.",
            "Prepare the images again with --holdout 5%.",
            code=ExitCode.DATA,
        )
    if not validate_every:
        raise DiffkitError(f"--stop-when {rule} looks at held-out images.", "Leave --validate-every 0 out.")


def _train(
    given: dict[str, Any],
    store: Store,
    run: RunDir,
    device: str,
    length: dict[str, Any],
    preview_every: int | None,
    save_seconds: float,
    validate_every: int,
    stop_when: Any,
) -> None:
    from diffkit.cli.console import next_command, plain, say
    from diffkit.cli.live import Stopper, draw
    from diffkit.compose import prepare_training
    from diffkit.engine.session import Cadence
    from diffkit.errors import ExitCode

    with ExitStack() as stack:
        stopper = stack.enter_context(Stopper())
        begun = run.exists
        if begun:
            stack.enter_context(run.locked())
        else:
            run.check_free()
        training = prepare_training(given, store, run, device)
        if not begun:
            stack.enter_context(run.locked())
            training.create()
        batch = training.recipe.batch_size
        until = _until(**length, batch=batch, store=store)
        every = preview_every if preview_every is not None else _preview_every(until, batch)
        cadence = Cadence(
            until_images=until,
            seconds=length["seconds"],
            preview_every=every,
            save_seconds=save_seconds,
            validate_every=validate_every if store.holdout_count else 0,
            snapshot_every=training.snapshot_every(until),
            stop_when=stop_when,
        )
        seen = training.state.images_seen
        _introduce(training, cadence)
        if until is not None and seen >= until:
            training.complete()
            say(f"It has already seen {seen:,} images ({seen // batch:,} steps), and {until:,} were asked for.")
            say("Ask for more with --steps, --epochs or --time.")
            next_command(f"diffkit sample {run.path}")
            return
        if stop_when and training.over(stop_when, training.history()):
            training.complete()
            _say_why(stop_when, training)
            return
        _record_session(training, cadence)
        ended = draw(training, cadence, stopper)
    if ended.reason == "stopped":
        say(f"Stopped and saved after {ended.images_seen:,} images. The same command goes on from there.")
        raise typer.Exit(int(ExitCode.RESUMABLE))
    if ended.reason in ("memorizing", "plateau"):
        _say_why(ended.reason, training)
        return
    say(f"[green]Done[/] after {ended.images_seen:,} images. Model: [bold]{plain(str(run.model))}[/].")
    next_command(f"diffkit sample {run.path}")


def _say_why(rule: str, training: Training) -> None:
    """A stopping rule has ended the training, now or at an earlier start."""
    from diffkit.cli.console import next_command, say
    from diffkit.engine.stopping import best

    history = training.history()
    turn = best(history)
    assert turn is not None
    seen = f"[green]Stopped[/] after {history[-1].images_seen:,} images: the held-out loss"
    if rule == "memorizing":
        say(f"{seen} was lowest at {turn.images_seen:,} and has risen since, while the training loss still falls:")
        say("the model begins to learn its images by heart.")
    else:
        say(f"{seen} no longer falls; it was lowest at {turn.images_seen:,}. Leave --stop-when out to go on.")
    next_command(f"diffkit sample {training.run.best}")


def _run_dir(out: Path | None, data: Path, given: dict[str, Any], store: Store) -> RunDir:
    """The folder named, or the first runs/DATA, runs/DATA-2, ... that is free or that this command would resume."""
    from diffkit.compose import compatible
    from diffkit.rundir import RunDir, numbered

    if out is not None:
        return RunDir(out)
    runs = map(RunDir, numbered(Path("runs") / (data.resolve().name or "run")))
    return next(run for run in runs if not run.path.exists() or (run.exists and compatible(given, store, run)))


def _size(text: str | None) -> list[int] | None:
    from diffkit.cli.console import image_size

    return None if text is None else list(image_size(text))


def _until(steps: int | None, epochs: float | None, seconds: float | None, *, batch: int, store: Store) -> int | None:
    """Images to have seen at the end. The default: 200 passes, at least 200,000 images, at most 10 million."""
    if steps is not None:
        return steps * batch
    if epochs is not None:
        return max(batch, round(epochs * store.count / batch) * batch)
    if seconds is not None:
        return None
    return -(-min(max(200 * store.count, 200_000), 10_000_000) // batch) * batch


def _preview_every(until: int | None, batch: int) -> int:
    """Ten grids over the training, none closer than 500 steps (or every 50,000 images, if its length is a time)."""
    return max(until // 10 if until else 50_000, min(500 * batch, (until or 0) // 2 or 50_000))


def _introduce(training: Training, cadence: Cadence) -> None:
    from diffkit.cli.console import bytes_text, plain, say
    from diffkit.engine.devices import describe

    settings, train = training.settings, training.settings.train
    parameters = sum(p.numel() for p in training.state.network.parameters())
    length = f"{cadence.until_images:,} images" if cadence.until_images else "the time given"
    if cadence.until_images:
        length += f" = {cadence.until_images // training.recipe.batch_size:,} steps"
        length += f" = {cadence.until_images / training.store.count:.4g} epochs"
    say(f"[bold]{plain(str(training.run.path))}[/] on {describe(training.device)}, {train.precision}")
    say(f"  data       {training.store.count:,} images {training.spec}")
    say(f"  backbone   {plain(settings.backbone.name)}, {parameters / 1e6:.1f}M parameters")
    say(f"             {plain(settings.backbone.text(' '))}")
    say(f"  scheduler  {plain(str(settings.scheduler))}   prediction  {plain(settings.prediction.name)}")
    micro = f" in pieces of {train.micro_batch}" if train.micro_batch != train.batch_size else ""
    say(f"  batch      {train.batch_size}{micro}, learning rate {train.lr:g}")
    if train.ema_snapshots:
        disk = bytes_text(train.ema_snapshots * len(train.ema_lengths) * parameters * 4)
        say(f"  averages   {train.ema_snapshots} snapshots of {len(train.ema_lengths)}, at most {disk} on disk")
    say(f"  length     {length}")
    if 0 < training.state.images_seen < (cadence.until_images or math.inf):
        say(f"  going on from {training.state.images_seen:,} images")
    for note in training.notes:
        say(f"  [yellow]{plain(note)}[/]")


def _record_session(training: Training, cadence: Cadence) -> None:
    import platform
    import sys
    import time

    import torch

    from diffkit import __version__, durable

    durable.append_line(
        training.run.sessions,
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "from_images": training.state.images_seen,
            "until_images": cadence.until_images,
            "seconds": cadence.seconds,
            "preview_every": cadence.preview_every,
            "validate_every": cadence.validate_every,
            "stop_when": cadence.stop_when,
            "data_images": training.store.count,
            "data_holdout": training.store.holdout_count,
            "data_mean": list(training.store.mean),
            "data_std": list(training.store.std),
            "command": ["diffkit", *sys.argv[1:]],
            "micro_batch": training.recipe.micro_batch,
            "device": str(training.device),
            "diffkit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
