"""When to stop: rules over the history of the held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffkit.engine.validate import Validated

PATIENCE, LATER, MARGIN = 3, 1.1, 0.002
LEAST, SPAN, IMPROVEMENT = 5, 0.3, 0.005


def best(history: Sequence[Validated]) -> Validated | None:
    """The validation with the lowest held-out loss."""
    return min(history, key=lambda each: each.holdout_loss, default=None)


def memorizing(history: Sequence[Validated]) -> bool:
    """The held-out loss has turned while the training loss still falls.

    At least 3 validations and a tenth more images after the best held-out loss, the last is 0.2 % above it, and the
    loss of the training images, under the same fixed noise, has fallen since.
    """
    turn = best(history)
    if turn is None:
        return False
    last, after = history[-1], sum(each.images_seen > turn.images_seen for each in history)
    late = after >= PATIENCE and last.images_seen >= LATER * turn.images_seen
    worse = last.holdout_loss > (1 + MARGIN) * turn.holdout_loss
    return late and worse and last.training_loss < turn.training_loss


def plateau(history: Sequence[Validated]) -> bool:
    """The best held-out loss has fallen by less than 0.5 % over the last 30 % of the images; needs 5 validations."""
    if len(history) < LEAST:
        return False
    start = (1 - SPAN) * history[-1].images_seen
    earlier, now = best([each for each in history if each.images_seen <= start]), best(history)
    return earlier is not None and now is not None and now.holdout_loss > (1 - IMPROVEMENT) * earlier.holdout_loss


RULES: dict[str, Callable[[Sequence[Validated]], bool]] = {"memorizing": memorizing, "plateau": plateau}
