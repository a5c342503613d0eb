"""`diffkit plan`: what a training will take here, before it is begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffkit.cli.options import MACHINE, PART, AsJson, BatchSize, Device

if TYPE_CHECKING:
    from diffkit.compose import Training
    from diffkit.compose.planning import Planned

FEW_PASSES, MANY_PASSES = 20, 300


def plan(
    data: Annotated[Path, typer.Argument(help="A data set made by diffkit prepare.")],
    time: Annotated[
        str | None, typer.Option(metavar="DURATION", help="The time there is: 30m, 2h. By default, enough.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Size of the network: tiny, small, base, large.")] = None,
    backbone: Annotated[str | None, typer.Option(metavar=PART, help="Network.")] = None,
    batch_size: BatchSize = "auto",
    lr_test: Annotated[
        bool, typer.Option("--lr-test", help="Also look for a learning rate, by short trainings at several.")
    ] = False,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=MACHINE)] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in TOML; options override it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as train.clip=0.5.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Network, batch, learning rate, speed, memory and time of a training on this machine: some steps are tried.

    No run is begun. The training, given the same options, says in the end how far the plan was off.
    """
    from dataclasses import asdict

    from diffkit.cli.console import count_or_auto, duration, print_json
    from diffkit.cli.start import default_images
    from diffkit.cli.train import given_settings
    from diffkit.compose.planning import plan as make_plan
    from diffkit.engine.store import Store

    batch = count_or_auto("--batch-size", batch_size)
    chosen = {"preset": preset, "train.batch_size": batch, "train.precision": precision}
    given = given_settings(data, config, {"backbone": backbone}, chosen, settings or [])
    store = Store.open(data)
    seconds = duration(time) if time else None
    training, planned = make_plan(
        given, store, device, seconds=seconds, images=default_images(store.count), lr_test=lr_test
    )
    if as_json:
        train = training.settings.train
        names = ("batch_size", "lr", "precision", "compile", "ema_half_life")
        how = {name: getattr(train, name) for name in names} | {"device": str(training.device)}
        print_json({**asdict(planned), **how, **({"lr": planned.lr} if planned.lr else {})})
        return
    words: dict[str, str | Path | None] = {"--time": time, "--preset": preset, "--backbone": backbone}
    words |= {"--batch-size": str(batch) if batch else None, "--precision": precision, "--config": config}
    words |= {"--device": None if device == "auto" else device, "--lr": str(planned.lr) if planned.lr else None}
    options = [part for key, value in words.items() if value is not None for part in (key, value)]
    rest = [each for each in settings or [] if planned.lr is None or each.partition("=")[0].strip() != "train.lr"]
    options += [part for each in rest for part in ("--set", each)]
    _show(training, planned, ["train", data, *options])


def _show(training: Training, planned: Planned, command: Sequence[str | Path]) -> None:
    from diffkit.cli.console import clock, next_command, plain, say
    from diffkit.cli.start import say_model
    from diffkit.core.ema import WARM_UP
    from diffkit.engine.devices import describe
    from diffkit.names import bytes_text

    train = training.settings.train
    say(f"[bold]{plain(str(training.store.path))}[/]: {training.store.count:,} images {training.spec}")
    way = "compiled" if train.compile == "on" else "not compiled"
    say(f"  on         {describe(training.device)}, {train.precision}, {way}")
    say_model(training)
    if planned.lr is not None:
        say(f"  rate       a learning rate of {planned.lr:g} gets furthest in a few steps, instead of {train.lr:g}")
    longest = min(train.ema_half_life, WARM_UP * planned.images)
    say(f"  average    of the weights, at the end with a half-life of {longest:,.0f} images")
    memory = "" if planned.memory is None else f", {bytes_text(planned.memory)} of memory"
    say(f"  speed      {planned.images_per_second:,.0f} images a second{memory}")
    say(f"  time       {clock(planned.seconds)} = {planned.images:,} images = {planned.epochs:,.4g} epochs")
    for note in [*training.notes, *_advice(planned, bool(training.store.holdout_count))]:
        say(f"  [yellow]{plain(note)}[/]")
    next_command(*command)


def _advice(planned: Planned, held_out: bool) -> list[str]:
    """What so many passes over the data usually mean."""
    if planned.epochs < FEW_PASSES:
        return [f"Fewer than {FEW_PASSES} passes leave shapes vague: more time, smaller images or a smaller network."]
    if planned.epochs > MANY_PASSES:
        remedy = (
            "--stop-when memorizing ends it in time" if held_out else "hold images out to notice (prepare --holdout)"
        )
        return [f"After some hundred passes a model may begin to memorize its images: {remedy}."]
    return []
