"""What a training will take, found by trying some steps of it; and, when it is over, how far that was off."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit import durable
from diffkit.compose.start import prepare_training
from diffkit.compose.training import Training
from diffkit.config import Settings, to_tables
from diffkit.errors import DiffkitError, ExitCode
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    from torch import Tensor

    from diffkit.engine.store import Store

WARMUP_STEPS, LEAST_STEPS, TRIAL_SECONDS = 2, 4, 8.0
TRAINING_SHARE = 0.9
"""The share of the time that is training; the rest goes to looks at held-out images, sample grids and checkpoints."""
RATE_STEPS = 40
NEVER = 10**9  # steps: a training reports at its end alone
PROBED = ("precision", "compile", "channels_last", "fused", "micro_batch", "lr")


@dataclass(frozen=True)
class Planned:
    """images_per_second of the training itself, memory in bytes (None if unknown), and what a budget gives.

    `lr`: that which gets furthest in a few steps, if that was asked for.
    """

    images_per_second: float
    memory: int | None
    images: int
    seconds: float
    epochs: float
    lr: float | None = None


def plan(
    given: Mapping[str, Any],
    store: Store,
    device: str,
    *,
    seconds: float | None,
    images: int | None,
    lr_test: bool = False,
) -> tuple[Training, Planned]:
    """Train a few steps on the device, in memory only. With `seconds`, how many images that is; else how long it takes.

    `images` is what the length would be if no time is given; with `lr_test` a learning rate is looked for, too. Raises
    DiffkitError if the time is not enough for a step.
    """
    from diffkit.compose.machine import Length
    from diffkit.engine.devices import finish, memory_used
    from diffkit.engine.gradients import STEPS_TRIED
    from diffkit.engine.graphs import graphs_on
    from diffkit.engine.train import Reduced, Remark

    length = Length(images=images if seconds is None else None, seconds=seconds)
    training = prepare_training(given, store, RunDir(Path(os.devnull)), device, length=length)
    batch = training.recipe.batch_size
    untrained = copy.deepcopy(training.state.network.state_dict()) if lr_test else None
    steps, begun = 0, time.perf_counter()
    warm_up = WARMUP_STEPS + (STEPS_TRIED if graphs_on(training.device) else 0)
    for event in training.steps(report_every=training.report_every):
        if isinstance(event, Reduced):
            training.notes.append(
                f"The memory holds {event.micro_batch} images at once; the batch is made of such pieces."
            )
            continue
        if isinstance(event, Remark):
            training.notes.append(event.text)
            continue
        steps += 1
        if steps == warm_up:
            finish(training.device)
            start = time.perf_counter()
        if steps >= warm_up + LEAST_STEPS and time.perf_counter() - begun > TRIAL_SECONDS:
            finish(training.device)
            break
    speed = (steps - warm_up) * batch / (time.perf_counter() - start)
    total = images if seconds is None else int(TRAINING_SHARE * seconds * speed) // batch * batch
    if not total:
        raise DiffkitError(
            f"In that time it does not get through one batch of {batch} images ({batch / speed:.0f} s).",
            "Give it more --time, or choose a smaller --preset or --batch-size.",
        )
    memory = memory_used(training.device)  # before anything else needs some
    planned = Planned(
        images_per_second=round(speed, 2),
        memory=memory,
        images=total,
        seconds=round(total / speed / TRAINING_SHARE, 1) if seconds is None else seconds,
        epochs=round(total / store.count, 2),
        lr=None if untrained is None else _learning_rate(training, untrained),
    )
    with suppress(DiffkitError):  # without it the training cannot say how far the plan was off
        place = _place(training.settings, str(training.device))
        durable.make_folders(place.parent)
        durable.write_json(place, asdict(planned))
    return training, planned


def _learning_rate(training: Training, start: Mapping[str, Tensor]) -> float:
    """That with which a short training gets furthest from these weights. Leaves the training spent."""
    from diffkit.engine.rates import best_rate
    from diffkit.engine.train import Progress, State

    network, batch = training.state.network, training.recipe.batch_size

    def loss_at(lr: float) -> float:
        """Of the second half, by level and unweighted: a learned weighting would learn to make it small."""
        network.load_state_dict(start)
        training.state = State(network, training.recipe)
        recipe = replace(training.recipe, lr=lr, warmup_images=0)
        by_level: tuple[float | None, ...] = ()
        try:
            for half in (1, 2):
                for event in training.steps(half * RATE_STEPS // 2 * batch, NEVER, recipe):
                    by_level = event.by_level if isinstance(event, Progress) else ()
        except DiffkitError as error:
            if error.code != ExitCode.NON_FINITE:
                raise
            return math.inf
        errors = [error for error in by_level if error is not None]
        return sum(errors) / len(errors)

    return best_rate(loss_at, training.recipe.lr)


def planned_before(settings: Settings, device: str) -> Planned | None:
    """What `plan` found for this training on this device, if it was asked."""
    try:
        return Planned(**json.loads(_place(settings, device).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _place(settings: Settings, device: str) -> Path:
    """In the cache, under all that the speed depends on but what is found by trial anyway."""
    tables = to_tables(settings)
    train = {key: value for key, value in tables["train"].items() if key not in PROBED}
    data = {key: value for key, value in tables["data"].items() if key != "path"}
    text = json.dumps([{**tables, "train": train, "data": data, "parts": {}}, device], sort_keys=True)
    return durable.cache_folder() / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
