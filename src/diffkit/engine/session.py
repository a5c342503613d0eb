"""One start of a training: the loop, with its reports, previews and checkpoints, until it is time to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from diffkit.engine.appearance import Appearance
from diffkit.engine.train import NonFinite, Progress, Reduced, Remark, State
from diffkit.engine.validate import Validated, due

Reason: TypeAlias = Literal["done", "time", "stopped", "memorizing", "plateau"]


@dataclass(frozen=True)
class Saved:
    """A checkpoint and the model have been written, as they were at `images_seen`; `seconds` is how long the
    session waited for it between two steps."""

    images_seen: int
    seconds: float


@dataclass(frozen=True)
class NotSaved:
    """An error ends the training, and its state, as it was at `images_seen`, could not be saved either."""

    images_seen: int
    reason: str


@dataclass(frozen=True)
class Previewed:
    """A grid of samples has been written; how they look, and what looks wrong with them, in words."""

    images_seen: int
    path: Path
    appearance: Appearance
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Samples have been compared with the real images: a distance by its name, with its 95 % interval."""

    images_seen: int
    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ended:
    """Why it ended: all images seen, time up, asked to stop (by a signal: resumable), or by a stopping rule."""

    images_seen: int
    reason: Reason


Event: TypeAlias = (
    "Progress | Reduced | Remark | NonFinite | Saved | NotSaved | Previewed | Validated | Measured | Ended"
)


@dataclass(frozen=True)
class Cadence:
    """How long, and how often what is done. None = no limit; `preview_every` and `validate_every` in images, 0 = never;
    `snapshot_every` in images, 0 = never; `stop_when`: a rule of `diffkit.engine.stopping`."""

    until_images: int | None
    seconds: float | None = None
    preview_every: int = 0
    save_seconds: float = 600.0
    validate_every: int = 0
    snapshot_every: int = 0
    stop_when: Literal["memorizing", "plateau"] | None = None


@dataclass(frozen=True)
class Chores:
    """What a session does beside training. `save`: begin to write the state as it is now; `validate`: None without
    held-out images; `measure`: beside each preview, None if that is not wanted; `over`: a rule wants to stop; `agreed`:
    whether this is so in any process. `missed`: what was due at the last step before a start, which a request to stop
    left out: "validate", "snapshot", "preview"."""

    save: Callable[[], Future[None]]
    preview: Callable[[], Previewed]
    validate: Callable[[], Validated | NonFinite] | None
    snapshot: Callable[[], None]
    over: Callable[[], bool]
    measure: Callable[[], Measured] | None
    should_stop: Callable[[], bool]
    agreed: Callable[[bool], bool] = lambda flag: flag
    missed: Collection[str] = ()


def session(
    state: State, steps: Iterator[Progress | Reduced | Remark | NonFinite], cadence: Cadence, chores: Chores
) -> Iterator[Event]:
    """Run `steps` (from `train`), yielding its progress and what is done along the way.

    The state is saved now and then, written while training goes on, and at the end. It is not when an error ends it:
    whoever calls this may, as long as `state.updating` is false.
    """
    saving: _Saving | None = None
    begun = saved = time.monotonic()
    before = saved_at = state.images_seen
    reason: Reason = "done"
    if chores.validate and "validate" in chores.missed:
        yield chores.validate()
    if "snapshot" in chores.missed:
        chores.snapshot()
    if "preview" in chores.missed:
        yield from _show(chores)
    for progress in steps:
        yield progress
        if not isinstance(progress, Progress):
            before = min(before, state.images_seen)  # after a way back, what lies ahead is due once more
            continue
        if saving is not None and saving.written.done():
            yield saving.saved()
            saving = None
        now = progress.images_seen
        last = cadence.until_images is not None and now >= cadence.until_images
        stopped = chores.agreed(chores.should_stop())
        late = cadence.seconds is not None and chores.agreed(time.monotonic() - begun >= cadence.seconds)
        if chores.validate and not stopped and (last or late or due(before, now, cadence.validate_every)):
            yield chores.validate()
            if cadence.stop_when and chores.over():
                reason = cadence.stop_when
                break
        if not last and crossed(before, now, cadence.snapshot_every):
            chores.snapshot()
        if not stopped and not last and crossed(before, now, cadence.preview_every):
            yield from _show(chores)
        before = now
        if stopped or (late and not last):
            reason = "stopped" if stopped else "time"
            break
        # What is saved has been looked at: a report has found all steps before it to be finite.
        reported = progress.loss is not None
        if saving is None and not last and reported and time.monotonic() - saved >= cadence.save_seconds:
            saving = _save(state, chores.save)
            saved, saved_at = time.monotonic(), state.images_seen
    if saving is not None:
        yield saving.saved()
    if saved_at != state.images_seen:
        yield _save(state, chores.save).saved()
    if reason != "stopped" and cadence.snapshot_every:
        chores.snapshot()
    if reason != "stopped" and cadence.preview_every:
        yield from _show(chores)
    yield Ended(state.images_seen, reason)


def _show(chores: Chores) -> Iterator[Event]:
    yield chores.preview()
    if chores.measure:
        yield chores.measure()


@dataclass(frozen=True)
class _Saving:
    """A state on its way to the disk."""

    images_seen: int
    seconds: float
    written: Future[None]

    def saved(self) -> Saved:
        """Once it is there. Raises what kept it from being written."""
        start = time.perf_counter()
        self.written.result()
        return Saved(self.images_seen, self.seconds + time.perf_counter() - start)


def _save(state: State, save: Callable[[], Future[None]]) -> _Saving:
    start = time.perf_counter()
    written = save()
    return _Saving(state.images_seen, time.perf_counter() - start, written)


def crossed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` images lies between two steps; 0 = never."""
    return every > 0 and now // every > before // every
