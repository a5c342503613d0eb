"""Steps that go back to the last checkpoint where one was not finite, and from there on without its batch.

On a CPU all this is a function of the checkpoint, so a training that was cut off after it had gone back does the same
again when it goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffkit.compose.training import Training
    from diffkit.engine.train import NonFinite, OnNan, Progress, Reduced, Remark
    from diffkit.engine.validate import Validated


def steps_of(
    training: Training, until_images: int | None, report_every: int, on_nan: OnNan, history: list[Validated]
) -> Iterator[Progress | Reduced | Remark | NonFinite]:
    """The training's steps; with `on_nan` "rollback" they go back where one was not finite, and `history` with them."""
    from diffkit.engine.checkpoint import latest_checkpoint
    from diffkit.engine.progress import MOST_ROLLBACKS, Diverged

    passed_over = set[int]()
    while True:
        try:
            yield from training.steps(until_images, report_every, on_nan=on_nan, passed_over=passed_over)
            return
        except Diverged as error:
            found = error.found
            if on_nan != "rollback" or found.first is None:
                raise
            if len(passed_over) == MOST_ROLLBACKS:
                again = f"It has gone back to a checkpoint {MOST_ROLLBACKS} times."
                raise Diverged(replace(found, action="abort"), again) from error
        passed_over.add(found.first)
        training.saver.wait()
        training.world.wait()
        checkpoint, _ = latest_checkpoint(training.run.checkpoints)
        assert checkpoint is not None
        training.state.restore(checkpoint)
        seen = training.state.images_seen
        if training.world.leads:
            training.run.rewind_metrics(seen)
        history[:] = [each for each in history if each.images_seen <= seen]
        yield replace(found, images_seen=seen)
