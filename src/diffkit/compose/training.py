"""A training, from settings and data to events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.machine import with_precision, with_way
from diffkit.compose.model import Model, model_path
from diffkit.compose.parts import bound, denoiser_of, levels, task_of
from diffkit.compose.reference import run_through
from diffkit.compose.settings import new_settings, resumed_settings, training_spec
from diffkit.config import Settings, to_tables
from diffkit.engine.distributed import ALONE, World
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.compose.reference import Reference
    from diffkit.compose.tracking import Dropped, Trackers
    from diffkit.core.denoiser import Denoiser
    from diffkit.core.weighing import Weigh
    from diffkit.engine.batches import Batches
    from diffkit.engine.saver import Saver
    from diffkit.engine.session import Cadence, Event, Measured, Previewed
    from diffkit.engine.store import Pixels, Store
    from diffkit.engine.train import Progress, Recipe, Reduced, State
    from diffkit.engine.validate import Validated

PREVIEW_IMAGES, MEASURED_IMAGES = 64, 256


@dataclass
class Training:
    """A run, ready to go on: built by `prepare_training`."""

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
    ) -> Iterator[Progress | Reduced]:
        """The bare training from where it is, of which nothing is written; see `diffkit.engine.train.train`.

        `recipe`: another than its own.
        """
        from diffkit.core.denoiser import squared_error
        from diffkit.engine.train import train

        return train(
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
        )

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
        """A grid of samples by the averaged weights, a row or a column for each class, and the samples' colours."""
        from diffkit.engine.pictures import colours, grid, save_png
        from diffkit.engine.session import Previewed

        model = self.model()
        count = min(PREVIEW_IMAGES, max(16, 2**20 // (self.spec.height * self.spec.width)))
        columns = min(len(self.spec.classes), 10) or 8
        if self.spec.image_channels:
            images, shown, columns = self._preview_task(model, min(count, 24) // 8 * 8)
        else:
            count -= count % columns
            classes = self.spec.classes[:columns] or None
            images = shown = model.sample(count, classes=classes, seed=self.recipe.seed)
            rows = count // columns
            if classes and columns < rows:  # few classes: a row for each makes the wider picture
                shown = images.reshape(rows, columns, *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
                columns = rows
        path = self.run.samples / f"images-{self.state.images_seen:012d}.png"
        if self.world.leads:
            save_png(path, grid(shown, columns))
        return Previewed(self.state.images_seen, path, *colours(images))

    def _preview_task(self, model: Model, count: int) -> tuple[Pixels, Pixels, int]:
        """Images made from held-out ones; and those in triples: what was shown, what was made, what was there."""
        import numpy as np

        from diffkit.compose.wishes import Wishes
        from diffkit.engine.codec import encode
        from diffkit.engine.inputs import stored_pictures

        inputs = stored_pictures(self.store, self.spec)
        wishes = model.wishes(Wishes(inputs=inputs, seed=self.recipe.seed))
        made = model.collect(model.plan(seed=self.recipe.seed), count, wishes)
        image = wishes(range(count)).image
        assert image is not None
        shown = encode(image)[..., : self.spec.channels].numpy()
        shown = np.broadcast_to(shown[..., :1], made.shape) if shown.shape[-1] < self.spec.channels else shown
        part = "holdout" if self.store.holdout_count else "train"
        indices = np.arange(count) % len(inputs)
        there = self.store.gather(indices, part)[0]
        top, left = (there.shape[1] - made.shape[1]) // 2, (there.shape[2] - made.shape[2]) // 2
        there = there[:, top : top + made.shape[1], left : left + made.shape[2]]
        return made, np.stack([shown, made, there], 1).reshape(-1, *made.shape[1:]), 12

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


def prepare_training(
    given: Mapping[str, Any], store: Store, run: RunDir, device_name: str, world: World = ALONE
) -> Training:
    """A new run with the settings `given` (nested tables), or the one that is there, checked against them.

    Of a new run nothing is written yet: that is `Training.create`. Of an old one the caller holds the lock. Raises
    DiffkitError if the run was begun with other settings or other data.
    """
    import torch

    from diffkit.engine.checkpoint import latest_checkpoint, set_aside
    from diffkit.engine.devices import choose_device, keep_freed_memory
    from diffkit.engine.speed import prepared
    from diffkit.engine.train import State

    device = choose_device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    settings = resumed_settings(given, store, run) if run.exists else new_settings(given, store, device)
    spec = training_spec(settings, store.spec)
    checkpoint, notes = None, []
    if run.exists:
        checkpoint, damaged = latest_checkpoint(run.checkpoints)
        notes = [f"{problem} An older checkpoint is used instead." for problem in damaged.values()]
        if world.leads:
            set_aside(damaged)
            run.tidy()
    torch.manual_seed(settings.train.seed)
    network = bound("backbone", settings)(spec)
    _check_parameters(network)
    if settings.train.init and checkpoint is None:
        notes += _initialise(network, Path(settings.train.init))
    network.to(device)
    settings = with_precision(settings, network, spec, device)
    settings, way, tried = with_way(settings, network, spec, device, probe=not run.exists, world=world)
    notes += tried
    run_as = prepared(network, way)  # before the averages are copied from it, so that all have one layout
    recipe = _recipe(settings)
    state = State(network, recipe)
    if checkpoint is not None:
        state.restore(checkpoint)
    training = Training(
        run=run,
        settings=settings,
        spec=spec,
        store=store,
        state=state,
        denoiser=denoiser_of(run_as, settings, device, settings.train.precision),
        recipe=recipe,
        device=device,
        notes=notes,
        world=world,
    )
    training.check()
    return training


def _initialise(network: nn.Module, path: Path) -> list[str]:
    """Copy the weights that fit; returns a note about those that do not (new classes)."""
    from diffkit.engine.modelfile import read_model

    tensors, _ = read_model(model_path(path))
    own = network.state_dict()
    fitting = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise DiffkitError(f"No weight of {path} fits this network.", code=ExitCode.MODEL)
    network.load_state_dict(fitting, strict=False)
    fresh = [name for name in own if name not in fitting]
    return [f"Started from {path}; new, because they do not fit: {', '.join(fresh)}."] if fresh else []


def _recipe(settings: Settings) -> Recipe:
    from diffkit.engine.train import Recipe

    train = settings.train
    assert train.batch_size is not None and train.micro_batch is not None and train.lr is not None
    return Recipe(
        batch_size=train.batch_size,
        micro_batch=train.micro_batch,
        lr=train.lr,
        warmup_images=train.warmup_images,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
        clip=train.clip,
        ema_half_life=train.ema_half_life,
        seed=train.seed,
        ema_lengths=tuple(train.ema_lengths) if train.ema_snapshots else (),
        learned_weighting=train.learned_weighting,
    )


def _check_parameters(network: nn.Module) -> None:
    if not any(p.requires_grad for p in network.parameters()):
        raise DiffkitError("The backbone has no parameter to train.")
