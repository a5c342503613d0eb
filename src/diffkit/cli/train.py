"""`diffkit train`: a prepared data set -> a run with a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffkit import paths
from diffkit.cli.options import MACHINE, PART, BatchSize, Device, Gpus

if TYPE_CHECKING:
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir

LENGTH, MODEL, DATA = "Length and output", "Model", "Data"


def train(
    data: Annotated[Path, typer.Argument(help="A data set made by diffkit prepare.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The run's folder; by default runs/DATA.", rich_help_panel=LENGTH)
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="Optimiser steps in all.", rich_help_panel=LENGTH)
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Passes over the data in all.", rich_help_panel=LENGTH)
    ] = None,
    time: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Stop after 90s, 30m, 2h.", rich_help_panel=LENGTH)
    ] = None,
    preview_every: Annotated[
        int | None,
        typer.Option(
            min=0, max=10**12, metavar="IMAGES", help="Images between sample grids; 0 = none.", rich_help_panel=LENGTH
        ),
    ] = None,
    validate_every: Annotated[
        int,
        typer.Option(
            min=0,
            max=10**12,
            metavar="IMAGES",
            help="Images between looks at held-out ones; 0 = none.",
            rich_help_panel=LENGTH,
        ),
    ] = 5_000,
    stop_when: Annotated[
        str | None,
        typer.Option(metavar="RULE", help="Also stop when memorizing, or at a plateau.", rich_help_panel=LENGTH),
    ] = None,
    best: Annotated[
        str,
        typer.Option(metavar="METRIC", help="best.safetensors is by held-out loss, or by kid.", rich_help_panel=LENGTH),
    ] = "holdout",
    on_nan: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="A loss that is not finite: abort, skip the step, or rollback.",
            rich_help_panel=LENGTH,
        ),
    ] = "abort",
    save_every: Annotated[
        str, typer.Option(metavar="DURATION", help="Time between checkpoints.", rich_help_panel=LENGTH)
    ] = "10m",
    scheduler: Annotated[str | None, typer.Option(metavar=PART, help="Noise schedule.", rich_help_panel=MODEL)] = None,
    prediction: Annotated[
        str | None, typer.Option(metavar=PART, help="eps, x0, v, flow, edm.", rich_help_panel=MODEL)
    ] = None,
    backbone: Annotated[str | None, typer.Option(metavar=PART, help="Network.", rich_help_panel=MODEL)] = None,
    weighting: Annotated[
        str | None,
        typer.Option(metavar=PART, help="Of the loss: min-snr, soft-min-snr, p2, sigmoid.", rich_help_panel=MODEL),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar=PART, help="From images: super-resolution, inpaint, colorize, translate.", rich_help_panel=MODEL
        ),
    ] = None,
    factor: Annotated[
        int | None, typer.Option(min=2, help="Of --task super-resolution.", rich_help_panel=MODEL)
    ] = None,
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
    batch_size: BatchSize = "auto",
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass; gradients add up.", rich_help_panel=MACHINE)
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=MODEL)] = None,
    ema_snapshots: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Keep N snapshots for diffkit ema; 0 = none.", rich_help_panel=MODEL),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, rich_help_panel=MODEL)] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(metavar=PART, help="Also report to tensorboard, wandb, mlflow, trackio.", rich_help_panel=LENGTH),
    ] = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    exact_elastic: Annotated[
        bool | None,
        typer.Option(
            "--exact-elastic",
            help="Bitwise the same with 1, 2, 4 or 8 processes, at the cost of speed.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.", rich_help_panel=MACHINE)] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in TOML; options override it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as train.clip=0.5.")
    ] = None,
) -> None:
    """Train a model. The same command again goes on where it stopped.

    Ctrl-C saves and stops. Without --steps, --epochs or --time it trains for a length that suits the data.
    """
    from diffkit.cli.console import count_or_auto, duration
    from diffkit.cli.launch import launch, launched
    from diffkit.cli.start import Start, begin, check_wishes
    from diffkit.engine.store import Store
    from diffkit.errors import DiffkitError

    if gpus > 1 and not launched():
        launch(gpus, device, resumable=True)
    if steps is not None and epochs is not None:
        raise DiffkitError("--steps and --epochs both say how long to train.", "Give one of them.")
    if epochs is not None and not 0 < epochs < 1e9:
        raise DiffkitError(f"--epochs must be above 0 and below 10^9, got {epochs}.")
    flags = {
        "preset": preset,
        "task.factor": factor,
        "data.size": _size(size),
        "data.flip": flip,
        "train.batch_size": count_or_auto("--batch-size", batch_size),
        "train.micro_batch": micro_batch,
        "train.lr": lr,
        "train.ema_snapshots": ema_snapshots,
        "train.exact_elastic": exact_elastic,
        "train.seed": seed,
        "train.precision": precision,
        "train.init": init,
    }
    parts = {"scheduler": scheduler, "prediction": prediction, "backbone": backbone}
    parts |= {"weighting": weighting, "task": task}
    given = given_settings(data, config, parts, flags, settings or [])
    store = Store.open(data, verify=False)  # `begin` verifies it, once the processes have met
    start = Start(
        device=device,
        steps=steps,
        epochs=epochs,
        seconds=duration(time) if time else None,
        preview_every=preview_every,
        save_seconds=duration(save_every),
        validate_every=validate_every,
        stop_when=stop_when,
        best=best,
        on_nan=on_nan,
        track=track or [],
    )
    check_wishes(start, store)
    begin(start, given, store, _run_dir(out, data, given, store))


def given_settings(
    data: Path, config: Path | None, parts: dict[str, str | None], flags: dict[str, Any], assignments: list[str]
) -> dict[str, Any]:
    """Nested tables of what was asked for: a recipe, over it the parts and flags that are not None, then --set."""
    from diffkit.config import Settings, put, put_part, read_toml, set_from_text, validated

    given: dict[str, Any] = read_toml(config) if config else {}
    validated(given, str(config))
    for key, text in parts.items():
        if text is not None:
            default = Settings.model_fields[key].default
            put_part(given, key, text, default.name if default else text.partition(":")[0])
    for key, value in flags.items():
        if value is not None:
            put(given, key, value)
    for assignment in assignments:
        set_from_text(given, assignment)
    put(given, "data.path", str(data))
    validated(given)
    return given


def _run_dir(out: Path | None, data: Path, given: dict[str, Any], store: Store) -> RunDir:
    """The folder named, or the first runs/DATA, runs/DATA-2, ... that is free or that this command would resume."""
    from diffkit.cli.console import plain, say
    from diffkit.compose import contradiction
    from diffkit.rundir import RunDir, numbered

    if out is not None:
        return RunDir(out)
    reason = ""
    for path in numbered(Path("runs") / (data.resolve().name or "run")):
        run = RunDir(path)
        if not paths.exists(path):
            break
        other = contradiction(given, store, run) if run.exists else None
        if other is None and run.exists:
            return run
        reason = other.message if other else f"{path} holds something that is not a run."
    if reason:
        say(f"[yellow]A new run, {plain(str(path))}:[/] {plain(reason)}")
    return run


def _size(text: str | None) -> list[int] | None:
    from diffkit.cli.console import image_size

    return None if text is None else list(image_size(text))
