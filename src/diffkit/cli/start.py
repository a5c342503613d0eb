"""One start of a training: how long, and what is printed at its beginning and its end."""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from diffkit.names import bytes_text

if TYPE_CHECKING:
    from diffkit.compose import Trackers, Training
    from diffkit.compose.machine import Length
    from diffkit.compose.reference import Reference
    from diffkit.engine.distributed import World
    from diffkit.engine.session import Cadence
    from diffkit.engine.store import Store
    from diffkit.rundir import RunDir


JUDGED_SECONDS = 15.0
LARGE = 2**31  # bytes, which take a second or more to read


@dataclass(frozen=True)
class Start:
    """What the command line asks of this start, and may ask otherwise of the next one of the same run."""

    device: str
    steps: int | None
    epochs: float | None
    seconds: float | None
    preview_every: int | None
    save_seconds: float
    validate_every: int
    stop_when: Any
    best: str = "holdout"
    on_nan: Any = "abort"
    track: list[str] = field(default_factory=list)


def check_wishes(start: Start, store: Store) -> None:
    """Raises DiffkitError if the stopping rule, or the choice of the best model, cannot be followed."""
    from diffkit.cli.console import chosen_among
    from diffkit.errors import DiffkitError, ExitCode

    chosen_among("--best", start.best, ["holdout", "kid"])
    chosen_among("--on-nan", start.on_nan, ["abort", "skip", "rollback"])
    if start.best == "kid" and start.preview_every == 0:
        raise DiffkitError("--best kid is measured whenever samples are drawn.", "Leave --preview-every 0 out.")
    rule = start.stop_when
    if rule is None:
        return
    chosen_among("--stop-when", rule, ["memorizing", "plateau"])
    if not store.holdout_count:
        raise DiffkitError(
            f"--stop-when {rule} looks at held-out images, and {store.path} has none.",
            "Prepare the images again with --holdout 5%.",
            code=ExitCode.DATA,
        )
    if not start.validate_every:
        raise DiffkitError(f"--stop-when {rule} looks at held-out images.", "Leave --validate-every 0 out.")


def begin(start: Start, given: dict[str, Any], store: Store, run: RunDir) -> None:
    """Train, from the beginning or from where the run stands; exits with 75 if it was asked to stop."""
    from diffkit.cli.console import next_command, plain, say
    from diffkit.cli.live import Stopper, draw
    from diffkit.compose.due import complete
    from diffkit.compose.failures import memory_explained
    from diffkit.engine.distributed import joined
    from diffkit.errors import ExitCode

    with ExitStack() as stack:
        world = stack.enter_context(joined(start.device))
        _verify(store)
        stopper = stack.enter_context(Stopper())
        if not world.leads:
            world.wait()
        with memory_explained():
            training, trackers = _opened(start, given, store, run, world, stack)
        if world.leads:
            world.wait()
        batch = training.recipe.batch_size
        cadence = _cadence(start, training)
        until = cadence.until_images
        seen = training.state.images_seen
        _introduce(training, cadence)
        if until is not None and seen >= until:
            complete(training, cadence, by_loss=start.best == "holdout")
            say(f"It has already seen {seen:,} images ({seen // batch:,} steps), and {until:,} were asked for.")
            say("Ask for more with --steps, --epochs or --time.")
            next_command("sample", run.path)
            return
        if cadence.stop_when and training.over(cadence.stop_when, training.history()):
            complete(training, cadence, by_loss=start.best == "holdout")
            _say_why(cadence.stop_when, training)
            return
        stack.enter_context(trackers)
        if world.leads:
            _record_session(training, cadence, start)
        clock = time.monotonic()
        ended = draw(training, cadence, stopper, trackers, _reference(start, training), start.on_nan)
        _say_off(training, ended.images_seen - seen, time.monotonic() - clock)
    if ended.reason == "stopped":
        say(f"Stopped and saved after {ended.images_seen:,} images. The same command goes on from there.")
        raise typer.Exit(int(ExitCode.RESUMABLE))
    if ended.reason in ("memorizing", "plateau"):
        _say_why(ended.reason, training)
        return
    say(f"[green]Done[/] after {ended.images_seen:,} images. Model: [bold]{plain(str(run.model))}[/].")
    next_command("sample", run.path)


def _verify(store: Store) -> None:
    """Compare the data set with its checksums; of several processes on a machine one does that for all.

    The others wait in a meeting, and as long as it takes: not in `joined`, which has a deadline.
    """
    from diffkit.cli.console import say

    if os.environ.get("LOCAL_RANK", "0") == "0":
        if store.nbytes > LARGE:
            say(f"Comparing {bytes_text(store.nbytes)} of data with their checksums ...")
        store.check()


def _say_off(training: Training, images: int, seconds: float) -> None:
    """How far `diffkit plan` was off, if it was asked and there was enough to judge it by."""
    from diffkit.cli.console import say
    from diffkit.compose.planning import planned_before
    from diffkit.engine.devices import memory_used

    planned = planned_before(training.settings, str(training.device))
    if planned is None or seconds < JUDGED_SECONDS or training.world.size > 1:
        return
    expected, found = planned.images / planned.seconds, images / seconds
    off = f"{found / expected - 1:+.0%}"
    held = memory_used(training.device)
    memory = ""
    if planned.memory and held:
        off_memory = f"{held / planned.memory - 1:+.0%}"
        memory = f" Memory: {bytes_text(planned.memory)} planned, {bytes_text(held)} held ({off_memory})."
    say(f"Planned: {expected:,.0f} images a second, all included. It was {found:,.0f} ({off}).{memory}")


def _opened(
    start: Start, given: dict[str, Any], store: Store, run: RunDir, world: World, stack: ExitStack
) -> tuple[Training, Trackers]:
    """The run, begun or gone on with; its leading process holds the lock and tells the trackers."""
    from diffkit.compose import Trackers, prepare_training

    length = _length(start, store)
    if not world.leads:
        training = prepare_training(given, store, run, start.device, world, length)
        return training, Trackers([], run, training.settings)
    run.check_free()
    stack.enter_context(run.locked())
    run.tidy()
    training = prepare_training(given, store, run, start.device, world, length)
    trackers = Trackers(start.track, run, training.settings)
    training.begin()
    return training, trackers


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
        say("the model begins to memorize its images.")
    else:
        say(f"{seen} no longer falls; it was lowest at {turn.images_seen:,}. Leave --stop-when out to go on.")
    next_command("sample", training.run.best)


def _reference(start: Start, training: Training) -> Reference | None:
    """The training images as the extractor sees them, if the best model is to be the nearest to them."""
    if start.best != "kid":
        return None
    from diffkit.cli.console import drawn
    from diffkit.compose.reference import Reference

    reference = Reference.of(training.model(), training.store.path, "lite0")
    drawn(reference.look())
    return reference


def _cadence(start: Start, training: Training) -> Cadence:
    from diffkit.engine.session import Cadence

    batch, store = training.recipe.batch_size, training.store
    until = _until(start, batch, store)
    every = start.preview_every if start.preview_every is not None else _preview_every(until, batch)
    return Cadence(
        until_images=until,
        seconds=start.seconds,
        preview_every=every,
        save_seconds=start.save_seconds,
        validate_every=start.validate_every if store.holdout_count else 0,
        snapshot_every=training.snapshot_every(until),
        stop_when=start.stop_when,
    )


def _until(start: Start, batch: int, store: Store) -> int | None:
    """Images to have seen at the end."""
    if start.steps is not None:
        return start.steps * batch
    if start.epochs is not None:
        return max(batch, round(start.epochs * store.count / batch) * batch)
    if start.seconds is not None:
        return None
    return -(-default_images(store.count) // batch) * batch


def _length(start: Start, store: Store) -> Length:
    """The same before the batch is known, if the run begins now."""
    from diffkit.compose.machine import Length

    if start.steps is not None:
        return Length(steps=start.steps, seconds=start.seconds)
    if start.epochs is not None:
        return Length(images=round(start.epochs * store.count), seconds=start.seconds)
    return Length(images=default_images(store.count) if start.seconds is None else None, seconds=start.seconds)


def default_images(count: int) -> int:
    """200 passes over the data, at least 200,000 images, at most 10 million."""
    return min(max(200 * count, 200_000), 10_000_000)


def _preview_every(until: int | None, batch: int) -> int:
    """Ten grids over the training, none closer than 500 steps (or every 50,000 images, if its length is a time)."""
    return max(until // 10 if until else 50_000, min(500 * batch, (until or 0) // 2 or 50_000))


def _introduce(training: Training, cadence: Cadence) -> None:
    from diffkit.cli.console import plain, say
    from diffkit.engine.devices import describe

    train = training.settings.train
    parameters = sum(p.numel() for p in training.state.network.parameters())
    length = f"{cadence.until_images:,} images" if cadence.until_images else "the time given"
    if cadence.until_images:
        length += f" = {cadence.until_images // training.recipe.batch_size:,} steps"
        length += f" = {cadence.until_images / training.store.count:.4g} epochs"
    many = f" and {training.world.size - 1} more like it" if training.world.size > 1 else ""
    say(f"[bold]{plain(str(training.run.path))}[/] on {describe(training.device)}{many}, {train.precision}")
    where = f", all of them on {training.device}" if training.resident else ""
    say(f"  data       {training.store.count:,} images {training.spec}{where}")
    say_model(training)
    if train.ema_snapshots:
        disk = bytes_text(train.ema_snapshots * len(train.ema_lengths) * parameters * 4)
        say(f"  averages   {train.ema_snapshots} snapshots of {len(train.ema_lengths)}, at most {disk} on disk")
    say(f"  length     {length}")
    if 0 < training.state.images_seen < (cadence.until_images or math.inf):
        say(f"  going on from {training.state.images_seen:,} images")
    for note in training.notes:
        say(f"  [yellow]{plain(note)}[/]")


def say_model(training: Training) -> None:
    """Network, schedule and batch, a line each."""
    from diffkit.cli.console import plain, say

    settings, train = training.settings, training.settings.train
    parameters = sum(p.numel() for p in training.state.network.parameters())
    say(f"  backbone   {plain(settings.backbone.name)}, {parameters / 1e6:.1f}M parameters")
    say(f"             {plain(settings.backbone.text(' '))}")
    say(f"  scheduler  {plain(str(settings.scheduler))}   prediction  {plain(settings.prediction.name)}")
    micro = f" in pieces of {train.micro_batch}" if train.micro_batch != train.batch_size else ""
    say(f"  batch      {train.batch_size}{micro}, learning rate {train.lr:g}")


def _relative(path: Path, start: Path) -> str | None:
    """The way to a folder from another; None where there is none (another drive)."""
    try:
        return os.path.relpath(path, start)
    except ValueError:
        return None


def _record_session(training: Training, cadence: Cadence, start: Start) -> None:
    import platform
    import sys

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
            "data": str(training.store.path.absolute()),
            "data_from_run": _relative(training.store.path, training.run.path),
            "data_images": training.store.count,
            "data_holdout": training.store.holdout_count,
            "data_mean": list(training.store.mean),
            "data_std": list(training.store.std),
            "on_nan": start.on_nan,
            "track": start.track,
            "command": ["diffkit", *sys.argv[1:]],
            "micro_batch": training.recipe.micro_batch,
            "device": str(training.device),
            "processes": training.world.size,
            "diffkit": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
