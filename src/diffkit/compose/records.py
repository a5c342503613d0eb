"""What the events of a training leave in metrics.jsonl, and the names of the images that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.durable import read_lines

if TYPE_CHECKING:
    from diffkit.engine.session import Event


def record_of(event: Event, run: Path) -> dict[str, Any] | None:
    """The line that an event leaves, if it leaves one. JSON has no NaN: such a loss is null, and said in words."""
    from diffkit.engine.session import Previewed
    from diffkit.engine.train import NonFinite, Progress
    from diffkit.engine.validate import Validated

    if isinstance(event, Progress) and event.loss is not None:
        return {
            "images": event.images_seen,
            "step": event.step,
            "loss": event.loss,
            "grad_norm": event.grad_norm,
            "lr": event.lr,
            "images_per_second": round(event.images_per_second, 2),
            "data_wait": round(event.data_wait, 4),
            "loss_by_level": list(event.by_level),
        }
    if isinstance(event, NonFinite):
        return {
            "images": event.images_seen,
            "step": event.step,
            "loss": None,
            "non_finite": f"{event.name} is {event.value}",
            "on_nan": event.action,
            "examples": list(event.examples),
        }
    if isinstance(event, Validated):
        return event.to_record()
    if isinstance(event, Previewed):
        record = {
            "images": event.images_seen,
            "picture": event.path.relative_to(run).as_posix(),
            **event.appearance.to_record(),
        }
        return record | ({"problems": list(event.problems)} if event.problems else {})
    return None


def names(data: Path, indices: Sequence[int]) -> list[str]:
    """Of training images of the data set in this folder, by their numbers."""
    known = [record["id"] for record in read_lines(data / "examples.jsonl") if record.get("part") == "train"]
    return [str(known[index]) if index < len(known) else f"training image {index}" for index in indices]
