"""What a training should have done at the step where it stands, and has not: another start does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    from diffkit.compose.training import Training
    from diffkit.engine.session import Cadence
    from diffkit.engine.validate import Validated


def missed(training: Training, cadence: Cadence, history: Sequence[Validated], ended: bool = False) -> list[str]:
    """Return what was due at the last step and has not been done: of "validate", "snapshot" and "preview".

    ended: that was the last step of all, at which everything is due. The processes decide together, since all have to
    take part in what is done, and a file may reach one machine later than another.
    """
    from diffkit.engine.session import crossed
    from diffkit.engine.snapshots import has_snapshot
    from diffkit.engine.validate import due

    now = training.state.images_seen
    before = now - training.recipe.batch_size
    if before < 0:
        return []
    is_due = {
        "validate": due(before, now, cadence.validate_every) or (ended and cadence.validate_every > 0),
        "snapshot": crossed(before, now, cadence.snapshot_every) or (ended and cadence.snapshot_every > 0),
        "preview": crossed(before, now, cadence.preview_every) or (ended and cadence.preview_every > 0),
    }
    is_there = {
        "validate": lambda: any(each.images_seen == now for each in history),
        "snapshot": lambda: has_snapshot(training.run.snapshots, now),
        "preview": lambda: _has_preview(training),
    }
    return [what for what, wanted in is_due.items() if wanted and training.world.any(not is_there[what]())]


def complete(training: Training, cadence: Cadence, *, by_loss: bool = True) -> None:
    """Write what the last start did not come to at its last step: the model, and what is due then.

    by_loss: the best model is that with the lowest held-out loss.
    """
    from diffkit.compose.looks import validation
    from diffkit.engine.modelfile import read_model_header
    from diffkit.engine.snapshots import thin

    run = training.run
    try:
        current = read_model_header(run.model)["images_seen"] == training.state.images_seen
    except DiffkitError:
        current = False
    if not current and training.state.images_seen:
        training.save().result()
    history = training.history()
    left = missed(training, cadence, history, ended=True)
    if "validate" in left:
        training.add_to_metrics(validation(training, history, keep=by_loss, on_nan="skip")())
    if "snapshot" in left:
        training.snapshot()
    elif training.world.leads and cadence.snapshot_every:
        thin(run.snapshots, training.settings.train.ema_snapshots)
    if "preview" in left:
        training.add_to_metrics(training.preview())


def _has_preview(training: Training) -> bool:
    """Whether there is a preview of the state as it is."""
    from diffkit import records

    seen = training.state.images_seen
    return any(each and each["images"] == seen for each in records.metrics(training.run.metrics, "picture"))
