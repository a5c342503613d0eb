"""Trackers, which get the metrics and sample images of a training."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias

from diffkit.compose.parts import completed
from diffkit.config import PartChoice, Settings, to_tables
from diffkit.errors import DiffkitError
from diffkit.interfaces import TrackedRun
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    from diffkit.engine.session import Event
    from diffkit.interfaces import Log

Told: TypeAlias = "tuple[dict[str, float], dict[str, Path]]"
SECONDS = 1.0
PATIENCE, START_PATIENCE = 30.0, 120.0
"""Seconds that a tracker may take for a call, and to start: it may ask a server."""


@dataclass(frozen=True)
class Dropped:
    """A tracker has failed and gets nothing more; the training goes on."""

    tracker: str
    reason: str


class Trackers:
    """Those that a start of a training was given; used as a context manager while it lasts.

    Reports of steps are averaged over a second at least, or what is left at the end of the training, so that no tracker
    holds up short steps and each of them counts. Each tracker has a thread of its own, and is left out once it
    raises anything, or does not return within `PATIENCE`.
    """

    def __init__(self, names: Sequence[str], run: RunDir, settings: Settings) -> None:
        """Raises DiffkitError for a tracker or an option that there is not."""
        self.run, self.settings = run, settings
        self.chosen = [completed("trackers", PartChoice.model_validate(name)) for name in names]
        self._active: dict[str, _Active] = {}
        self._steps: list[dict[str, float]] = []
        self._told = time.monotonic()

    def __enter__(self) -> Trackers:
        told = TrackedRun(self.run.path, self.run.path.resolve().name, to_tables(self.settings), _identity(self.run))
        for choice, function in self.chosen:
            try:
                self._active[choice.name] = _Active(choice.name, function, told)
            except _Failed as error:
                list(self.finish())
                if isinstance(error.__cause__, DiffkitError):
                    raise error.__cause__ from None
                raise DiffkitError(
                    f"The tracker '{choice.name}' does not start: {error}.", "Train without it, or mend what it says."
                ) from error
        return self

    def __exit__(self, *exception: Any) -> None:
        list(self.finish())

    def tell(self, event: Event) -> Iterator[Dropped]:
        """Pass on what the event says; yields each tracker that failed."""
        from diffkit.engine.session import Ended

        figures, pictures = told(event)
        if "train/loss" in figures:
            self._steps.append(figures)
            if time.monotonic() - self._told >= SECONDS:
                yield from self._tell_steps(event.images_seen)
        elif figures or pictures:
            yield from self._log(event.images_seen, figures, pictures)
        if isinstance(event, Ended):
            yield from self._tell_steps(event.images_seen)

    def finish(self) -> Iterator[Dropped]:
        """Let all of them close what they have open; yields each that failed to."""
        while self._active:
            name, tracker = self._active.popitem()
            try:
                tracker.close()
            except _Failed as error:
                yield Dropped(name, str(error))

    def _tell_steps(self, images_seen: int) -> Iterator[Dropped]:
        if self._steps:
            figures = {name: sum(each[name] for each in self._steps) / len(self._steps) for name in self._steps[0]}
            self._steps, self._told = [], time.monotonic()
            yield from self._log(images_seen, figures, {})

    def _log(self, images_seen: int, figures: dict[str, float], pictures: dict[str, Path]) -> Iterator[Dropped]:
        for name, tracker in list(self._active.items()):
            try:
                tracker.log(images_seen, figures, pictures)
            except _Failed as error:
                del self._active[name]
                yield Dropped(name, str(error))


class _Failed(Exception):
    """A tracker has raised something, or has not returned in time."""


class _Active:
    """A tracker at work, in a thread that may hang and does not keep the process from ending. All raise _Failed."""

    def __init__(self, name: str, function: Callable[..., AbstractContextManager[Log]], run: TrackedRun) -> None:
        """Start it."""
        self._calls = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]()
        Thread(target=self._work, name=f"tracker {name}", daemon=True).start()
        self._manager = self._call(lambda: function(run), START_PATIENCE)
        self._log: Log = self._call(self._manager.__enter__, START_PATIENCE)

    def log(self, images_seen: int, figures: dict[str, float], pictures: dict[str, Path]) -> None:
        self._call(lambda: self._log(images_seen, figures, pictures), PATIENCE)

    def close(self) -> None:
        self._call(lambda: self._manager.__exit__(None, None, None), PATIENCE)
        self._calls.put(None)

    def _call(self, function: Callable[[], Any], seconds: float) -> Any:
        answer = Future[Any]()
        self._calls.put((answer, function))
        if not wait([answer], seconds).done:
            raise _Failed(f"no answer within {seconds:g} seconds")
        return answer.result()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            answer, function = call
            try:
                answer.set_result(function())
            except BaseException as error:  # sys.exit() among them
                failed = _Failed(f"{type(error).__name__}: {error}".rstrip(": "))
                failed.__cause__ = error
                answer.set_exception(failed)


def told(event: Event) -> Told:
    """What trackers get of an event: figures and pictures by name."""
    from diffkit.engine.session import Measured, Previewed
    from diffkit.engine.train import NonFinite, Progress
    from diffkit.engine.validate import Validated

    if isinstance(event, NonFinite):
        return {"train/non_finite": 1.0}, {}
    if isinstance(event, Progress) and event.loss is not None and event.grad_norm is not None:
        figures = {"train/loss": event.loss, "train/grad_norm": event.grad_norm, "train/lr": event.lr}
        return figures | {"speed/images_per_second": event.images_per_second, "speed/data_wait": event.data_wait}, {}
    if isinstance(event, Validated):
        figures = {"holdout/loss": event.holdout_loss, "holdout/training_loss": event.training_loss}
        levels = {f"holdout/loss_at_s_{s:.3g}": loss for s, loss in zip(event.levels, event.holdout, strict=True)}
        return figures | {"holdout/gap": event.gap} | levels, {}
    if isinstance(event, Measured):
        return {f"metric/{event.name}": event.value}, {}
    if isinstance(event, Previewed):
        colours = {f"colour/mean_{channel}": value for channel, value in enumerate(event.appearance.mean)}
        return colours, {"samples": event.path}
    return {}, {}


def _identity(run: RunDir) -> str:
    """The same at every start of one run, and another for a new run in the same place: its config is written once."""
    begun = run.config.stat().st_mtime_ns if run.exists else 0
    return hashlib.sha256(f"{run.path.resolve()} {begun}".encode()).hexdigest()[:16]
