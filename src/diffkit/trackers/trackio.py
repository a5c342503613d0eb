"""Trackio: a local, free tracker with the interface of Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit.interfaces import TrackedRun
from diffkit.trackers.library import required

if TYPE_CHECKING:
    from diffkit.interfaces import Log


@contextmanager
def trackio(run: TrackedRun, *, project: str = "diffkit", space: str = "") -> Iterator[Log]:
    """Trackio, on this machine or in a Hugging Face `space`. See it with: trackio show."""
    with required("trackio"):
        import sys

        import trackio as library

    with redirect_stdout(sys.stderr):  # it greets; standard output is for data
        tracked = library.init(
            project=project,
            name=f"{run.name}-{run.id[:6]}",
            space_id=space or None,
            config=dict(run.settings),
            resume="allow",
            embed=False,
        )
    try:

        def log(images_seen: int, figures: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
            shown = {name: library.Image(str(path)) for name, path in pictures.items()}
            tracked.log({"images": images_seen, **figures, **shown}, step=images_seen)

        yield log
    finally:
        with redirect_stdout(sys.stderr):
            tracked.finish()  # type: ignore[no-untyped-call]
