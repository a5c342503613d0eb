"""One start of a training: the loop, with its reports, previews and checkpoints, until it is time to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from diffkit.engine.train import Progress, State


@dataclass(frozen=True)
class Saved:
    """A checkpoint and the model have been written; `seconds` is how long training stood still for it."""

    images_seen: int
    seconds: float


@dataclass(frozen=True)
class Previewed:
    """A grid of samples has been written."""

    images_seen: int
    path: Path


@dataclass(frozen=True)
class Ended:
    """Why it ended: all images seen, time up, or asked to stop (by a signal: resumable)."""

    images_seen: int
    reason: Literal["done", "time", "stopped"]


Event: TypeAlias = "Progress | Saved | Previewed | Ended"


@dataclass(frozen=True)
class Cadence:
    """How long, and how often what is written. None = no limit; `preview_every` in images, 0 = never."""

    until_images: int | None
    seconds: float | None = None
    preview_every: int = 0
    save_seconds: float = 600.0


def session(
    state: State,
    steps: Iterator[Progress],
    cadence: Cadence,
    *,
    save: Callable[[], None],
    preview: Callable[[], Path],
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    """Run `steps` (from `train`), yielding its progress and what is written along the way.

    The state is saved at the end, whatever ended it, except an error: then the last checkpoint stands.
    """
    begun = saved = time.monotonic()
    before = saved_at = state.images_seen
    reason: Literal["done", "time", "stopped"] = "done"
    for progress in steps:
        yield progress
        last = cadence.until_images is not None and progress.images_seen >= cadence.until_images
        stopped = should_stop()
        late = cadence.seconds is not None and time.monotonic() - begun >= cadence.seconds
        if not stopped and not last and _crossed(before, progress.images_seen, cadence.preview_every):
            yield Previewed(progress.images_seen, preview())
        before = progress.images_seen
        if stopped or (late and not last):
            reason = "stopped" if stopped else "time"
            break
        if not last and time.monotonic() - saved >= cadence.save_seconds:
            yield _save(state, save)
            saved, saved_at = time.monotonic(), state.images_seen
    if saved_at != state.images_seen:
        yield _save(state, save)
    if reason != "stopped" and cadence.preview_every:
        yield Previewed(state.images_seen, preview())
    yield Ended(state.images_seen, reason)


def _save(state: State, save: Callable[[], None]) -> Saved:
    start = time.perf_counter()
    save()
    return Saved(state.images_seen, time.perf_counter() - start)


def _crossed(before: int, now: int, every: int) -> bool:
    return every > 0 and now // every > before // every
