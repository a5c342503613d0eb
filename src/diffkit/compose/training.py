"""A training, from settings and data to events."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.model import Model
from diffkit.compose.parts import bound, levels, task_of
from diffkit.compose.preview import preview
from diffkit.compose.ready import Follower
from diffkit.compose.records import names, record_of
from diffkit.compose.trial import check_weighting, first_use
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
    from diffkit.engine.checkpoint import Checkpoint
    from diffkit.engine.saver import Saver
    from diffkit.engine.session import Cadence, Event, Previewed
    from diffkit.engine.store import Store
    from diffkit.engine.train import NonFinite, OnNan, Progress, Recipe, Reduced, Remark, State
    from diffkit.engine.validate import Validated

SMALL_FILES = 2**20  # bytes: metrics, previews, what file systems need themselves


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
    saved_at: int | None = None
    """Images seen by the state that was last read from a checkpoint or begun to be saved; None if not known."""

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
        on_nan: OnNan = "abort",
    ) -> Generator[Event | Dropped, None, None]:
        """Train, yielding events; everything is written into the run directory, and passed to the trackers.

        The best model is that with the lowest held-out loss or, if a `reference` is given (looked at already), the
        lowest kernel distance to it, measured whenever a preview is made. `on_nan`: see `diffkit.engine.progress`.

        Whatever error ends it, one of a plugin's part or an end to the iteration among them, the state is saved as it
        was after the last step, unless that was not finite.
        """
        from diffkit.compose.failures import ended_by
        from diffkit.engine.train import NonFinite

        begun = self.saved_at = self.state.images_seen
        unwritten: Event | None = None
        try:
            for event in self._events(cadence, report_every, should_stop, reference, on_nan):
                if isinstance(event, NonFinite):
                    event = self.named(event)
                unwritten = event
                self.add_to_metrics(event)
                unwritten = None
                yield event
                if trackers is not None:
                    yield from trackers.tell(event)
            if trackers is not None:
                yield from trackers.finish()
        except BaseException as error:
            if unwritten is not None:  # the line belongs to the state that is now saved
                with suppress(DiffkitError):
                    self.add_to_metrics(unwritten)
            outcome, failure = ended_by(self, error, begun)
            if failure is not None:
                raise failure from error
            if outcome is not None and not isinstance(error, GeneratorExit):
                yield outcome
            raise
        finally:  # before the run's lock goes
            self.saver.wait()

    def _events(
        self,
        cadence: Cadence,
        report_every: int,
        should_stop: Callable[[], bool],
        reference: Reference | None,
        on_nan: OnNan,
    ) -> Iterator[Event]:
        from diffkit.compose.due import missed
        from diffkit.compose.looks import measurement, validation, watched
        from diffkit.compose.rollback import steps_of
        from diffkit.engine.session import Chores, session

        history = self.history()
        by_loss = reference is None
        chores = Chores(
            save=self.save,
            preview=watched(self, cadence),
            validate=validation(self, history, keep=by_loss, on_nan=on_nan) if cadence.validate_every else None,
            snapshot=self.snapshot,
            measure=None if reference is None else measurement(self, reference),
            over=lambda: cadence.stop_when is not None and self.over(cadence.stop_when, history),
            should_stop=should_stop,
            agreed=self.world.any,
            missed=missed(self, cadence, history),
        )
        steps = steps_of(self, cadence.until_images, report_every, on_nan, history)
        begun = False
        for event in session(self.state, steps, cadence, chores):
            if self.world.leads and not begun:
                self.saver.reserve(self.state.checkpoint())
                begun = True
            yield event
            self.saver.check()

    def steps(
        self,
        until_images: int | None = None,
        report_every: int = 1,
        recipe: Recipe | None = None,
        *,
        on_nan: OnNan = "abort",
        passed_over: Collection[int] = (),
    ) -> Iterator[Progress | Reduced | Remark | NonFinite]:
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
            on_nan=on_nan,
            passed_over=passed_over,
        )
        return self.world.computed(steps)

    @property
    def report_every(self) -> int:
        """Steps between reports: on a GPU, which would have to wait for each of them, some thousand images apart."""
        return 1 if self.device.type == "cpu" else max(1, 2048 * self.world.size // self.recipe.batch_size)

    def history(self) -> list[Validated]:
        """What was found on held-out images so far."""
        from diffkit import records
        from diffkit.engine.validate import Validated

        return [Validated.from_record(each) for each in records.metrics(self.run.metrics, "holdout_loss") if each]

    def over(self, rule: str, history: Sequence[Validated]) -> bool:
        """Whether this rule says to stop."""
        from diffkit.engine.stopping import RULES

        return RULES[rule](history)

    def named(self, event: NonFinite) -> NonFinite:
        """With the names of its batch's images."""
        import torch

        if event.first is None:
            return event
        positions = torch.arange(event.first, event.first + self.recipe.batch_size)
        return replace(event, examples=tuple(names(self.store.path, self.batches().indices(positions).tolist())))

    def add_to_metrics(self, event: Event) -> None:
        """The line that the event leaves, if it leaves one."""
        if self.world.leads and (record := record_of(event, self.run.path)):
            self.run.add_metrics(record)

    def check(self) -> None:
        """Raises DiffkitError now for a schedule, a weighting or a preview that would fail later."""
        self.levels()
        self.weigh()
        self._model(self.denoiser).plan()

    def check_space(self) -> None:
        """Raises DiffkitError (exit code 4) unless there is room for what the training keeps.

        A new checkpoint, model or snapshot is written before an old one goes.
        """
        from diffkit.durable import disk_full, free_space
        from diffkit.engine.checkpoint import KEEP, kept
        from diffkit.engine.snapshots import snapshots

        states = max(1, KEEP + 1 - kept(self.run.checkpoints)) * self.state.checkpoint().nbytes
        models = 3 - sum(path.exists() for path in (self.run.model, self.run.best))
        count = self.settings.train.ema_snapshots
        averages = max(1, count + 1 - len(snapshots(self.run.snapshots))) * len(self.state.tracks) if count else 0
        weights = sum(tensor.nbytes for tensor in self.state.average.state_dict().values())
        need = states + (models + averages) * weights + SMALL_FILES
        if free_space(self.run.path) < need:
            raise disk_full(self.run.path, need)

    def begin(self) -> None:
        """Begin the run on disk, or complete what a start that was cut off had begun; the caller holds its lock.

        A checkpoint of the very beginning is part of it: so a run that has been trained always has a checkpoint, and
        the absence of one is never a beginning.
        """
        from diffkit.engine.checkpoint import kept, save_checkpoint

        self.run.lay_out()
        self.check_space()
        if not self.run.exists:
            self.run.create(self.settings)
        if not kept(self.run.checkpoints):
            save_checkpoint(self.run.checkpoints, self._checkpoint())
        self.run.rewind_metrics(self.state.images_seen)

    def _checkpoint(self) -> Checkpoint:
        return replace(self.state.checkpoint(), config=self.run.config_sha256())

    def save(self) -> Future[None]:
        """Begin to write a checkpoint, then the model, of the state as it is now, which only `steps` may go on with."""
        from diffkit import durable
        from diffkit.engine.checkpoint import save_checkpoint
        from diffkit.engine.modelfile import write_tensors
        from diffkit.engine.train import under

        if not self.world.leads:
            nothing = Future[None]()
            nothing.set_result(None)
            return nothing
        header = self.header()

        def write(checkpoint: Checkpoint) -> None:
            durable.sync_path(self.run.metrics)  # what was measured up to here lasts as long as the checkpoint
            save_checkpoint(self.run.checkpoints, checkpoint)
            write_tensors(self.run.model, under(checkpoint.tensors, "average."), header)

        writing = self.saver.begin(self._checkpoint(), write)
        self.saved_at = self.state.images_seen
        return writing

    def write_model(self, path: Path) -> None:
        """Begin to write the averaged weights as they are now into this file."""
        from diffkit.engine.modelfile import write_tensors

        self._keep("average.", partial(write_tensors, path), self.header())

    def snapshot(self) -> None:
        """Begin to write the further averages as they are now."""
        from diffkit.engine.snapshots import save_snapshot

        lengths, keep = list(self.state.tracks), self.settings.train.ema_snapshots

        def write(averages: dict[str, Tensor], header: dict[str, Any]) -> None:
            save_snapshot(self.run.snapshots, averages, lengths, header, keep)

        self._keep("track-", write, self.header())

    def _keep(
        self, prefix: str, write: Callable[[dict[str, Tensor], dict[str, Any]], None], header: dict[str, Any]
    ) -> None:
        """Have the tensors under `prefix`, as they are now, written beside the training.

        A later checkpoint is written after them. So what the metrics say of them is read again only where they are
        there, or where they will be made again. Not so if a checkpoint of this very state is there already: then they
        are waited for.
        """
        from diffkit.engine.train import under

        if not self.world.leads:
            return
        state = self.state.checkpoint()
        tensors = {name: tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
        part = replace(state, tensors=tensors, trained=state.trained & tensors.keys())
        writing = self.saver.keep(part, lambda copy: write(under(copy.tensors, prefix), header))
        if self.saved_at in (None, state.images_seen):
            writing.result()

    def snapshot_every(self, until_images: int | None) -> int:
        """Images between snapshots: evenly over the training, or a fixed number if its end is not known; 0 = never."""
        from diffkit.engine.snapshots import SPACING

        count = self.settings.train.ema_snapshots
        return count and (max(1, until_images // count) if until_images else SPACING)

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
        """Samples by the averaged weights: their picture in the run, and how they look."""
        from diffkit.engine.appearance import Appearance
        from diffkit.engine.pictures import grid, save_png
        from diffkit.engine.session import Previewed

        images, shown, columns = preview(self.model(), self.store, self.recipe.seed)
        path = self.run.samples / f"images-{self.state.images_seen:012d}.png"
        if self.world.leads:
            save_png(path, grid(shown, columns))
        return Previewed(self.state.images_seen, path, Appearance.of(images))

    @cached_property
    def _follower(self) -> Follower:
        return Follower(self.spec, self.device, self.settings.train.precision)

    def averaged(self) -> Denoiser:
        """By the averaged weights as they are now."""
        return replace(self.denoiser, network=self._follower(self.state.average))

    def model(self) -> Model:
        """The averaged network as it is now."""
        return self._model(self.averaged())

    def _model(self, denoiser: Denoiser) -> Model:
        return Model(
            settings=self.settings,
            spec=self.spec,
            mean=tuple(self.store.mean),
            denoiser=denoiser,
            device=self.device,
            images_seen=self.state.images_seen,
            world=self.world,
            path=self.run.model,
        )

    def levels(self) -> Callable[[Tensor], Tensor]:
        settings = self.settings
        return levels(settings.scheduler, bound("scheduler", settings), settings, settings.noise.shift)

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
        import torch

        from diffkit.core.schedules import density
        from diffkit.core.weighing import by_weighting

        if self.settings.weighting is None:
            return None
        levels, weighting = self.levels(), bound("weighting", self.settings)
        with first_use("weightings", self.settings.weighting):
            s = levels(torch.linspace(0, 1, 65, dtype=torch.float64))
            check_weighting(self.settings.weighting, weighting(s, density(levels)(s)))
        return by_weighting(weighting, density(levels), self.denoiser.prediction, levels)
