"""Weights & Biases, online or into a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from diffkit.errors import DiffkitError
from diffkit.interfaces import TrackedRun
from diffkit.trackers.library import required

if TYPE_CHECKING:
    from diffkit.interfaces import Log

START_SECONDS = 30


@contextmanager
def wandb(
    run: TrackedRun, *, project: str = "diffkit", entity: str = "", mode: Literal["online", "offline"] = "online"
) -> Iterator[Log]:
    """Weights & Biases. mode=offline writes to RUN/wandb, to be sent later with: wandb sync."""
    with required("wandb"):
        import wandb as library

    settings = library.Settings(init_timeout=START_SECONDS, login_timeout=START_SECONDS, silent=True)
    try:
        tracked = library.init(
            project=project,
            entity=entity or None,
            name=run.name,
            id=run.id,
            resume="allow" if mode == "online" else None,
            dir=str(run.path),
            config=dict(run.settings),
            mode=mode,
            settings=settings,
        )
    except Exception as error:
        raise DiffkitError(
            f"Weights & Biases does not start: {error}.", "Run wandb login, or write --track wandb:mode=offline."
        ) from error
    with tracked:
        tracked.define_metric("*", step_metric="images")

        def log(images_seen: int, figures: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            shown = {name: library.Image(str(path)) for name, path in pictures.items()}
            tracked.log({"images": images_seen, **figures, **shown})

        yield log
