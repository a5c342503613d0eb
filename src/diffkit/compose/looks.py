"""What a training finds out about itself on the way: on held-out images, and by its samples beside the real ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from diffkit.compose.parts import task_of
from diffkit.compose.reference import run_through

if TYPE_CHECKING:
    from diffkit.compose.reference import Reference
    from diffkit.compose.training import Training
    from diffkit.engine.session import Cadence, Measured, Previewed
    from diffkit.engine.train import NonFinite, OnNan
    from diffkit.engine.validate import Validated

MEASURED_IMAGES = 256
REAL_IMAGES = 64
EARLY = 0.5
"""Share of a training, before which samples may look wrong: with some predictions they are noise, or flat, for long."""


def validation(
    training: Training, history: list[Validated], *, keep: bool, on_nan: OnNan
) -> Callable[[], Validated | NonFinite]:
    """Measure the held-out loss, add it to the history and, if wanted, keep the model if none was better.

    A loss that is not finite raises Diverged, or with `on_nan` "skip" is passed over.
    """
    from diffkit.engine.progress import Diverged
    from diffkit.engine.stopping import best
    from diffkit.engine.train import NonFinite
    from diffkit.engine.validate import Validation

    task, recipe = task_of(training.settings), training.recipe
    measured = Validation(
        training.store, training.spec, training.levels(), recipe.seed, task, training.world, recipe.micro_batch
    )

    def validate() -> Validated | NonFinite:
        seen = training.state.images_seen
        found = measured(training.averaged(), seen)
        for name, loss in (("held-out", found.holdout_loss), ("training", found.training_loss)):
            if not math.isfinite(loss):
                step = seen // recipe.batch_size
                not_finite = NonFinite(seen, step, f"the {name} loss of the averaged weights", loss, on_nan)
                if on_nan != "skip":
                    raise Diverged(not_finite)
                return not_finite
        history.append(found)
        if keep and best(history) is found:
            training.write_model(training.run.best)
        return found

    return validate


def measurement(training: Training, reference: Reference) -> Callable[[], Measured]:
    """Compare samples with the real images, note it, and keep the model if none was nearer."""
    from diffkit import records
    from diffkit.compose.comparison import Way, compare
    from diffkit.durable import append_line
    from diffkit.engine.session import Measured

    kept = [
        record["metrics"][0]["value"]
        for record in records.evaluations(training.run.evaluations)
        if record and record.get("while_training") and record["metrics"]
        if record["images_seen"] <= training.state.images_seen
    ]

    def measure() -> Measured:
        seen = training.state.images_seen
        (found,) = run_through(
            compare(reference, "train", "kid", [Way(training.model(), {})], MEASURED_IMAGES, training.recipe.seed)
        )
        record = {
            "images_seen": seen,
            "while_training": True,
            "extractor": str(reference.choice),
            "samples": found.images,
            **found.settings,
            "metrics": [found.metric.to_dict()],
            "floor": [],
            "reference": {"path": str(reference.path), "part": "train", "images": reference.train.count},
        }
        if training.world.leads:
            append_line(training.run.evaluations, record)
        if all(found.metric.value < value for value in kept):
            training.write_model(training.run.best)
        kept.append(found.metric.value)
        assert found.metric.low is not None and found.metric.high is not None
        return Measured(seen, found.metric.name, found.metric.value, found.metric.low, found.metric.high)

    return measure


def watched(training: Training, cadence: Cadence) -> Callable[[], Previewed]:
    """The training's preview, and what looks wrong with it: of samples that did look right, or are no longer early."""
    import numpy as np

    from diffkit import records
    from diffkit.engine.appearance import Appearance, problems

    store, begun = training.store, time.monotonic()
    some = np.linspace(0, store.count - 1, min(store.count, REAL_IMAGES)).astype(np.int64)
    real = Appearance.of(store.gather(some)[0])
    before = [each for each in records.metrics(training.run.metrics, "picture") if each]
    whole = [
        each for each in before if each.get("colour_mean") and None not in (each.get("contrast"), each.get("limits"))
    ]
    right = any(not problems(Appearance.from_record(each), real) for each in whole)

    def early() -> bool:
        by_images = training.state.images_seen / cadence.until_images if cadence.until_images else 0.0
        by_time = (time.monotonic() - begun) / cadence.seconds if cadence.seconds else 0.0
        return max(by_images, by_time) < EARLY

    def look() -> Previewed:
        nonlocal right
        found = training.preview()
        wrong = problems(found.appearance, real)
        right = right or not wrong
        return replace(found, problems=tuple(wrong)) if right or not early() else found

    return look
