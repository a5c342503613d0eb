"""The live display of a training: a bar on a terminal, plain lines elsewhere; and stopping it politely."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn

from diffkit.cli.console import clock, err, figure, is_live, plain, say
from diffkit.cli.output import notify
from diffkit.cli.signals import Signals
from diffkit.names import bytes_text

if TYPE_CHECKING:
    from diffkit.compose import Dropped, Trackers, Training
    from diffkit.compose.reference import Reference
    from diffkit.engine.progress import OnNan
    from diffkit.engine.session import Cadence, Ended, Event
    from diffkit.engine.train import NonFinite
    from diffkit.engine.train import Progress as Step

LINE_SECONDS = 10.0
SMOOTHING = 0.98
BAR = 24  # columns for the bar and its name
ERASE_LINE = "\r\x1b[K"


class Stopper:
    """The first signal asks to stop at the next step; a second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._signals = Signals(self._ask)

    def __enter__(self) -> Stopper:
        self._signals.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self._signals.restore()

    def __call__(self) -> bool:
        return self.asked

    def _ask(self) -> None:
        self.asked = True
        if not err.quiet:
            start = ERASE_LINE if is_live() else "\n"
            notify(f"{start}Stopping after this step and saving; once more to stop at once.\n")


def draw(
    training: Training,
    cadence: Cadence,
    stopper: Stopper,
    trackers: Trackers,
    reference: Reference | None,
    on_nan: OnNan = "abort",
) -> Ended:
    """Run the training and show it."""
    from diffkit.engine.session import Ended
    from diffkit.engine.train import Progress as Step

    events = training.start(
        cadence,
        report_every=training.report_every,
        should_stop=stopper,
        trackers=trackers,
        reference=reference,
        on_nan=on_nan,
    )
    display = _on_terminal if is_live() else _in_lines
    ended: Ended | None = None
    figures = _Figures(training, cadence)
    with display(cadence, figures) as show, closing(events):  # what ends it here, it still saves
        for event in events:
            if line := _event_line(event):
                say(line)
            if isinstance(event, Step) and event.loss is not None:
                figures.add(event)
                show(event)
            if isinstance(event, Ended):
                ended = event
    assert ended is not None
    return ended


class _Figures:
    """Smoothed figures of the latest steps, as text."""

    def __init__(self, training: Training, cadence: Cadence) -> None:
        self.training, self.cadence = training, cadence
        self.loss = self.speed = self.wait = 0.0
        self.weight = 0.0
        self.begun = time.monotonic()

    def add(self, step: Step) -> None:
        assert step.loss is not None
        self.weight = SMOOTHING * self.weight + 1 - SMOOTHING
        share = (1 - SMOOTHING) / self.weight
        self.loss += share * (step.loss - self.loss)
        self.speed += share * (step.images_per_second - self.speed)
        self.wait += share * (step.data_wait - self.wait)

    def remaining(self, seen: int) -> float | None:
        if self.cadence.seconds is not None:
            return max(0.0, self.cadence.seconds - (time.monotonic() - self.begun))
        if self.cadence.until_images is None or not self.speed:
            return None
        return (self.cadence.until_images - seen) / self.speed

    def texts(self, seen: int) -> list[str]:
        """What matters most comes first."""
        from diffkit.engine.devices import memory_used

        remaining = self.remaining(seen)
        memory = memory_used(self.training.device)
        texts = [f"loss {self.loss:.4f}", f"{self.speed:.1f} img/s" if self.speed < 10 else f"{self.speed:,.0f} img/s"]
        texts += [] if remaining is None else [f"{clock(remaining)} left"]
        texts += [] if memory is None else [bytes_text(memory)]
        return [*texts, f"data wait {self.wait:.0%}"]


def fitting(texts: list[str], width: int) -> str:
    """The first of these texts in one line, as many as fit into so many columns, and at least one."""
    line = texts[0]
    for text in texts[1:]:
        if len(line) + 2 + len(text) > width:
            break
        line += f"  {text}"
    return line


def _event_line(event: Event | Dropped) -> str | None:
    from diffkit.compose import Dropped
    from diffkit.engine.session import Measured, NotSaved, Previewed, Saved
    from diffkit.engine.train import NonFinite, Reduced, Remark
    from diffkit.engine.validate import Validated

    if isinstance(event, Dropped):
        return f"  [yellow]The tracker {plain(event.tracker)} failed and is left out: {plain(event.reason)}[/]"
    if isinstance(event, Reduced):
        return (
            f"  [yellow]Out of memory[/]: from here on {event.micro_batch} images a pass. The training stays the same."
        )
    if isinstance(event, Remark):
        return f"  {plain(event.text)}"
    if isinstance(event, NonFinite):
        return _non_finite_line(event)
    if isinstance(event, Saved):
        return f"  saved at {event.images_seen:,} images ({event.seconds:.1f} s)"
    if isinstance(event, NotSaved):
        return f"  [yellow]Not saved at {event.images_seen:,} images[/]: {plain(event.reason)}"
    if isinstance(event, Previewed):
        line = f"  samples at {event.images_seen:,} images: {plain(str(event.path))}"
        return line + "".join(f"\n  [yellow]{plain(problem)}[/]" for problem in event.problems)
    if isinstance(event, Measured):
        between = f"({figure(event.low)} to {figure(event.high)})"
        return f"  {event.name} {figure(event.value)} {between} at {event.images_seen:,} images"
    if isinstance(event, Validated):
        losses = f"held-out loss {event.holdout_loss:.4f}, training {event.training_loss:.4f}, gap {event.gap:+.1%}"
        return f"  {losses} at {event.images_seen:,} images"
    return None


def _non_finite_line(event: NonFinite) -> str:
    what = f"  [yellow]At step {event.step:,} {event.name} is no longer finite ({event.value})[/]"
    if event.first is None:
        return f"{what}."
    some = ", ".join(event.examples[:3]) + (", ..." if len(event.examples) > 3 else "")
    batch = f"its batch ({plain(some)})"
    if event.action == "rollback":
        return f"{what}: back to {event.images_seen:,} images, and on without {batch}."
    return f"{what}: the update by {batch} is left out."


@contextmanager
def _on_terminal(cadence: Cadence, figures: _Figures) -> Iterator[Callable[[Step], None]]:
    total = cadence.until_images
    bar = Progress(
        TextColumn("[bold]Training"),
        BarColumn(bar_width=None),
        TextColumn("{task.description}"),
        console=err,
        expand=True,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total or cadence.seconds)

        def show(step: Step) -> None:
            seen = step.images_seen
            counts = [f"{seen:,} / {total:,} images" if total else f"{seen:,} images"]
            line = fitting([*counts, *figures.texts(seen), f"step {step.step:,}"], err.width - BAR)
            bar.update(task, completed=seen if total else time.monotonic() - figures.begun, description=line)

        yield show


@contextmanager
def _in_lines(cadence: Cadence, figures: _Figures) -> Iterator[Callable[[Step], None]]:
    last = 0.0

    def show(step: Step) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            total = f" / {cadence.until_images:,}" if cadence.until_images else ""
            say(f"  {step.images_seen:,}{total} images  " + "  ".join(figures.texts(step.images_seen)))

    yield show
