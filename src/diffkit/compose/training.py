"""A training, from settings and data to events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.model import Model
from diffkit.compose.parts import bound, levels, task_of
from diffkit.compose.preview import preview
from diffkit.compose.reference import run_through
from diffkit.config import Settings, to_tables
from diffkit.engine.distributed import ALONE, World
from diffkit.errors import DiffkitError
from diffkit.interfaces import ImageSpec
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from diffkit.compose.reference import Reference
    from diffkit.compose.tracking import Dropped, Trackers
    from diffkit.core.denoiser import Denoiser
    from diffkit.core.weighing import Weigh
    from diffkit.engine.batches import Batches
    from diffkit.engine.saver import Saver
    from diffkit.engine.session import Cadence, Event, Measured, Previewed
    from diffkit.engine.store import Store
    from diffkit.engine.train import Progress, Recipe, Reduced, Remark, State
    from diffkit.engine.validate import Validated

MEASURED_IMAGES = 256


@dataclass
class Training:
    """A run, ready to go on: built by `compose.start`."""

    run: RunDir
    settings: Settings
    spec: ImageSpec
    store: Store
    state: State
    denoiser: Denoiser
    recipe: Recipe
    device: torch.device
    notes: list[str] = field(default_factory=list)
    world: World = ALONE

    @cached_property
    def saver(self) -> Saver:
        """Writes checkpoints beside the training."""
        from diffkit.engine.saver import Saver

        return Saver()

    def start(
        self,
        cadence: Cadence,
        *,
        report_every: int,
        should_stop: Callable[[], bool],
        trackers: Trackers | None = None,
        reference: Reference | None = None,
    ) -> Iterator[Event | Dropped]:
        """Train, yielding events; everything is written into the run directory, and told to the trackers.

        The best model is that with the lowest held-out loss or, if a `reference` is given (looked at already), the
        lowest kernel distance to it, measured whenever a preview is made.
        """
        from diffkit.engine.session import Chores, session

        history = self.history()
        validate = self._validation(history, keep=reference is None) if cadence.validate_every else None
        steps = self.steps(cadence.until_images, report_every)
        chores = Chores(
            save=self.save,
            preview=self.preview,
            validate=validate,
            snapshot=self.snapshot,
            measure=None if reference is None else self._measurement(reference),
            over=lambda: cadence.stop_when is not None and self.over(cadence.stop_when, history),
            should_stop=should_stop,
            agreed=self.world.any,
        )
        begun = False
        try:
            for event in session(self.state, steps, cadence, chores):
                if self.world.leads and not begun:
                    self.saver.reserve(self.state.checkpoint())
                    begun = True
                if self.world.leads and (record := _record(event, self.run)):
                    self.run.add_metrics(record)
                yield event
                if trackers is not None:
                    yield from trackers.tell(event)
        finally:  # before the run's lock goes
            self.saver.wait()

    def steps(
        self, until_images: int | None = None, report_every: int = 1, recipe: Recipe | None = None
    ) -> Iterator[Progress | Reduced | Remark]:
        """The bare training from where it is, of which nothing is written; see `diffkit.engine.train.train`.

        `recipe`: another than its own.
        """
        from diffkit.core.denoiser import squared_error
        from diffkit.engine.train import train

        steps = train(
            self.state,
            self.denoiser,
            self.batches(),
            self.levels(),
            squared_error,
            recipe or self.recipe,
            weigh=self.weigh(),
            until_images=until_images,
            report_every=report_every,
            world=self.world,
            before_update=self.saver.copied,
            cuda_graphs=self.settings.train.cuda_graphs,
        )
        return self.world.computed(steps)

    @property
    def report_every(self) -> int:
        """Steps between reports: on a GPU, which would have to wait for each of them, some thousand images apart."""
        return 1 if self.device.type == "cpu" else max(1, 2048 // self.recipe.batch_size)

    def history(self) -> list[Validated]:
        """What was found on held-out images so far."""
        from diffkit.durable import read_lines
        from diffkit.engine.validate import Validated

        return [Validated.from_record(record) for record in read_lines(self.run.metrics) if "holdout_loss" in record]

    def over(self, rule: str, history: Sequence[Validated]) -> bool:
        """Whether this rule says to stop."""
        from diffkit.engine.stopping import RULES

        return RULES[rule](history)

    def _validation(self, history: list[Validated], *, keep: bool) -> Callable[[], Validated]:
        """Measure the held-out loss, add it to the history and, if wanted, keep the model if none was better."""
        from diffkit.engine.stopping import best
        from diffkit.engine.validate import Validation

        task = task_of(self.settings)
        at_once = self.recipe.micro_batch
        validation = Validation(self.store, self.spec, self.levels(), self.recipe.seed, task, self.world, at_once)

        def validate() -> Validated:
            found = validation(replace(self.denoiser, network=self.state.average), self.state.images_seen)
            history.append(found)
            if keep and best(history) is found:
                self._write_model(self.run.best)
            return found

        return validate

    def _measurement(self, reference: Reference) -> Callable[[], Measured]:
        """Compare samples with the real images, note it, and keep the model if none was nearer."""
        from diffkit.compose.comparison import Way, compare
        from diffkit.durable import append_line, read_lines
        from diffkit.engine.session import Measured

        kept = [
            record["metrics"][0]["value"]
            for record in read_lines(self.run.evaluations)
            if record.get("while_training") and record["images_seen"] <= self.state.images_seen
        ]

        def measure() -> Measured:
            seen = self.state.images_seen
            (found,) = run_through(
                compare(reference, "train", "kid", [Way(self.model(), {})], MEASURED_IMAGES, self.recipe.seed)
            )
            record = {
                "images_seen": seen,
                "while_training": True,
                "extractor": str(reference.choice),
                "samples": found.images,
                **found.settings,
                "metrics": [found.metric.to_dict()],
                "floor": [],
                "reference": {"path": str(reference.path), "part": "train", "images": reference.train.count},
            }
            if self.world.leads:
                append_line(self.run.evaluations, record)
            if all(found.metric.value < value for value in kept):
                self._write_model(self.run.best)
            kept.append(found.metric.value)
            assert found.metric.low is not None and found.metric.high is not None
            return Measured(seen, found.metric.name, found.metric.value, found.metric.low, found.metric.high)

        return measure

    def check(self) -> None:
        """Raises DiffkitError now for a schedule or a preview that would fail later."""
        self.levels()
        self.model().plan()

    def create(self) -> None:
        """Begin the run on disk; the caller holds its lock."""
        self.run.create(self.settings)

    def save(self) -> Future[None]:
        """Begin to write a checkpoint, then the model, of the state as it is now, which only `steps` may go on with."""
        from diffkit.engine.checkpoint import Checkpoint, save_checkpoint
        from diffkit.engine.modelfile import write_tensors
        from diffkit.engine.train import under

        if not self.world.leads:
            nothing = Future[None]()
            nothing.set_result(None)
            return nothing
        header = self.header()

        def write(checkpoint: Checkpoint) -> None:
            save_checkpoint(self.run.checkpoints, checkpoint)
            write_tensors(self.run.model, under(checkpoint.tensors, "average."), header)

        return self.saver.begin(self.state.checkpoint(), write)

    def _write_model(self, path: Path) -> None:
        from diffkit.engine.modelfile import write_tensors

        if self.world.leads:
            write_tensors(path, self.state.average.state_dict(), self.header())

    def snapshot(self) -> None:
        """Keep the further averages as they are now."""
        from diffkit.engine.snapshots import save_snapshot

        if self.world.leads:
            save_snapshot(self.run.snapshots, self.state, self.header(), self.settings.train.ema_snapshots)

    def snapshot_every(self, until_images: int | None) -> int:
        """Images between snapshots: evenly over the training, or a fixed number if its end is not known; 0 = never."""
        from diffkit.engine.snapshots import SPACING

        count = self.settings.train.ema_snapshots
        return count and (max(1, until_images // count) if until_images else SPACING)

    def complete(self) -> None:
        """Write the model anew if the last start was cut off between its checkpoint and its model."""
        from diffkit.engine.modelfile import read_model_header

        try:
            current = read_model_header(self.run.model)["images_seen"] == self.state.images_seen
        except DiffkitError:
            current = False
        if not current and self.state.images_seen:
            self.save().result()

    def header(self) -> dict[str, Any]:
        """What `model.safetensors` says of itself."""
        return {
            "settings": self._tables,
            "spec": self.spec.to_dict(),
            "mean": list(self.store.mean),
            "images_seen": self.state.images_seen,
        }

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return to_tables(self.settings)

    def preview(self) -> Previewed:
        """Samples by the averaged weights: their picture in the run, and their colours."""
        from diffkit.engine.pictures import colours, grid, save_png
        from diffkit.engine.session import Previewed

        images, shown, columns = preview(self.model(), self.store, self.recipe.seed)
        path = self.run.samples / f"images-{self.state.images_seen:012d}.png"
        if self.world.leads:
            save_png(path, grid(shown, columns))
        return Previewed(self.state.images_seen, path, *colours(images))

    def model(self) -> Model:
        """The averaged network as it is now."""
        return Model(
            settings=self.settings,
            spec=self.spec,
            mean=tuple(self.store.mean),
            denoiser=replace(self.denoiser, network=self.state.average),
            device=self.device,
            images_seen=self.state.images_seen,
            world=self.world,
        )

    def levels(self) -> Callable[[Tensor], Tensor]:
        return levels(bound("scheduler", self.settings), self.settings, self.settings.noise.shift)

    @cached_property
    def resident(self) -> dict[str, Tensor]:
        """The training images that the device keeps, by kind: all of them, if they fit."""
        from diffkit.engine.resident import budget, resident

        kinds = ("images",) if self.settings.task is None else ("images", "inputs")
        return resident(self.store, kinds, self.device, budget(self.device))

    def batches(self) -> Batches:
        from diffkit.engine.batches import Batches

        data = self.settings.data
        task = task_of(self.settings)
        rest = (data.flip, data.label_dropout, task, self.resident)
        return Batches(self.store, self.spec, self.recipe.seed, *rest)

    def weigh(self) -> Weigh | None:
        from diffkit.core.schedules import density
        from diffkit.core.weighing import by_weighting

        if self.settings.weighting is None:
            return None
        levels = self.levels()
        return by_weighting(bound("weighting", self.settings), density(levels), self.denoiser.prediction, levels)


def _record(event: Event, run: RunDir) -> dict[str, Any] | None:
    """The line of metrics.jsonl that an event leaves, if it leaves one."""
    from diffkit.engine.session import Previewed
    from diffkit.engine.train import Progress
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
    if isinstance(event, Validated):
        return event.to_record()
    if isinstance(event, Previewed):
        picture = event.path.relative_to(run.path).as_posix()
        colours = {"colour_mean": list(event.colour_mean), "colour_std": list(event.colour_std)}
        return {"images": event.images_seen, "picture": picture, **colours}
    return None
