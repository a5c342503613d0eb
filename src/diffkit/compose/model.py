"""A trained model: loaded from its file, asked for images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit import paths
from diffkit.compose.machine import for_sampling, usual_batch
from diffkit.compose.parts import completed, denoiser_of, levels, network_of, task_of
from diffkit.compose.ready import for_many
from diffkit.compose.trial import check_sampler
from diffkit.config import PartChoice, Settings, to_tables, validated
from diffkit.engine.distributed import ALONE, World
from diffkit.errors import DiffkitError, ExitCode, nearest_sibling
from diffkit.interfaces import ImageSpec
from diffkit.names import command
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from diffkit.compose.wishes import Wishes
    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.sample import Images, Plan


CHECKPOINT = "state.safetensors"


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model, ready to make images. `path`: the file it was loaded from, or will be written to."""

    settings: Settings
    spec: ImageSpec
    mean: tuple[float, ...]
    denoiser: Denoiser
    device: torch.device
    images_seen: int
    sha256: str = ""
    world: World = ALONE
    path: Path | None = None
    _compiled: dict[int, Denoiser] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        spec, parameters = self.spec, sum(p.numel() for p in self.denoiser.network.parameters())
        return f"<Model {spec}, {parameters / 1e6:.1f}M parameters, {self.images_seen:,} images seen, on {self.device}>"

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        attributes: Mapping[str, float] | None = None,
        batch_size: int | None = None,
        **how: Any,
    ) -> npt.NDArray[np.uint8]:
        """`count` new images, uint8 [N, H, W, C]; image i depends on seed and i only.

        `classes` are taken in turn; `attributes` by name hold for all; `how`: see `plan`. Raises DiffkitError for an
        unknown class, attribute, sampler or schedule.
        """
        import torch

        from diffkit.compose.wishes import Wishes, class_labels, label_vector

        labels = class_labels(self.spec, classes)
        if attributes:
            given = label_vector(self.spec, {}, attributes)
            labels = given[None] if labels is None else torch.where(given != 0, given, labels)
        return self.collect(self.plan(seed=seed, **how), count, Wishes(labels), batch_size)

    def collect(
        self, plan: Plan, count: int, wishes: Wishes | None = None, batch_size: int | None = None
    ) -> npt.NDArray[np.uint8]:
        """The first `count` images of `generate`, in one array; each process of the model's world makes its share."""
        import torch

        images = torch.zeros(count, self.spec.height, self.spec.width, self.spec.channels, dtype=torch.uint8)
        own = range(count)[self.world.share(count)]
        for batch in self.generate(plan, own, wishes, batch_size=batch_size):
            images[batch.indices] = torch.from_numpy(batch.pixels)
        self.world.add([images])
        return images.numpy()

    def plan(
        self,
        *,
        sampler: str | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        strength: float = 1.0,
        guidance: float | None = None,
        guide: Model | None = None,
        guide_scale: float = 2.0,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
        threshold: float | None = None,
        resample: int = 1,
        seed: int = 0,
    ) -> Plan:
        """Names to functions; what is None follows the model's own settings.

        strength: how far up the schedule images that one begins with are taken, 1 = all the way. For the kinds of
        guidance see `diffkit.engine.sample.Guidance`. Raises DiffkitError for what makes no image.
        """
        from diffkit.compose.guidance import guidance_of
        from diffkit.core.schedules import sampling_grid
        from diffkit.engine.sample import Plan

        defaults = self.settings.sample
        parts = self.settings.parts
        chosen, function = completed("samplers", _choice(sampler, defaults.sampler), versions=parts.get("sampler"))
        grid, shape = completed("schedules", _choice(scheduler, defaults.scheduler), versions=parts.get("grid"))
        steps = defaults.steps if steps is None else steps
        if steps < 1:
            raise DiffkitError(f"{steps} steps make no image.", "Choose --steps 1 or more.")
        if not 0 < strength <= 1:
            raise DiffkitError(f"A strength of {strength} is none.", "0.3 changes little, 0.8 a lot, 1 everything.")
        if resample < 1:
            raise DiffkitError(f"{resample} passes make no image.", "--resample is 1 or more; 5 is plenty.")
        sigmas = sampling_grid(levels(grid, shape, self.settings), steps, top=strength)
        check_sampler(chosen, function, sigmas)
        return Plan(
            sampler=function,
            sigmas=sigmas,
            mean=self.mean,
            guidance=guidance_of(
                self,
                scale=defaults.guidance if guidance is None else guidance,
                guide=guide,
                guide_scale=guide_scale,
                interval=interval,
                rescale=rescale,
                threshold=threshold,
            ),
            seed=seed,
            resample=resample,
            strength=strength,
            names={"sampler": str(chosen), "scheduler": str(grid), "steps": steps},
        )

    def generate(
        self,
        plan: Plan,
        indices: Sequence[int],
        wishes: Wishes | None = None,
        *,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Iterator[Images]:
        """Image number i for each of `indices`, in batches; `size` (height, width): larger ones, made in tiles.

        Raises DiffkitError if the model needs inputs and gets none.
        """
        from diffkit.engine.sample import sample

        asked = self.wishes(wishes)
        batch_size = batch_size or self.default_batch
        calls = len(indices) // batch_size * len(plan.sigmas)
        made = sample(
            self.denoiser if size else self._denoiser_for(batch_size, calls),
            self.spec,
            plan,
            indices,
            asked,
            batch_size=batch_size,
            size=size,
        )
        return self.world.computed(made)

    def _denoiser_for(self, batch_size: int, calls: int) -> Denoiser:
        """Compiled where that pays, for each batch size once."""
        if batch_size not in self._compiled:
            found = for_many(self.denoiser, self.spec, self.device, batch_size, calls)
            if found is self.denoiser:
                return found
            self._compiled[batch_size] = found
        return self._compiled[batch_size]

    def trajectory(
        self, plan: Plan, count: int, wishes: Wishes | None = None
    ) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        """The first images on their way from noise: after each step its noise level and uint8 [N, H, W, C].

        Noise is shown in proportion: what is too bright for a picture is scaled down.
        """
        from diffkit.engine.sample import trajectory

        return trajectory(self.denoiser, self.spec, plan, range(count), self.wishes(wishes))

    def wishes(self, wishes: Wishes | None = None) -> Wishes:
        """The wishes, with the model's task; a model that knows labels is told that there are none."""
        import torch

        from diffkit.compose.wishes import Wishes

        wishes = wishes or Wishes()
        if self.spec.image_channels and wishes.inputs is None:
            raise DiffkitError(
                f"This model makes images from images ({self.settings.task}) and was given none.",
                "Name them: --input FOLDER.",
            )
        labels = wishes.labels
        if labels is None and self.spec.label_width:
            labels = torch.zeros(1, self.spec.label_width)
        return replace(wishes, labels=labels, task=task_of(self.settings))

    @property
    def default_batch(self) -> int:
        """Images at once."""
        return usual_batch(self.spec, self.device)


def _choice(text: str | None, default: PartChoice) -> PartChoice:
    return default if text is None else PartChoice.model_validate(text)


def model_path(path: str | Path) -> Path:
    """The model file of a run directory or a checkpoint's, or the file itself. Raises DiffkitError if there is none."""
    path = Path(path)
    for name in ("model.safetensors", CHECKPOINT):
        if paths.is_folder(path) and paths.exists(path / name):
            return path / name
    if paths.is_file(path):
        return path
    if RunDir(path).exists:
        raise DiffkitError(
            f"The run {path} has saved no model yet.",
            "Let it train until its first checkpoint.",
            code=ExitCode.MODEL,
        )
    if paths.exists(path):
        hint = "A run has a model.safetensors inside it."
        if paths.exists(path / "dataset.json"):
            hint = f"It is a prepared data set: train on it with: {command('train', path)}"
        raise DiffkitError(f"{path} is neither a run nor a model.", hint, code=ExitCode.MODEL)
    raise DiffkitError(f"There is no {path}.", nearest_sibling(path).strip(), code=ExitCode.MODEL)


def load_model(path: str | Path, *, device: str = "auto", precision: str = "auto", raw: bool = False) -> Model:
    """See `diffkit.load`."""
    from diffkit.engine.modelfile import read_model

    file = model_path(path)
    if file.name == CHECKPOINT:
        return _of_checkpoint(file, device=device, precision=precision, raw=raw)
    tensors, header = read_model(file)
    return model_of(_raw_weights(file) if raw else tensors, header, file, device=device, precision=precision)


def model_of(
    tensors: dict[str, Tensor], header: Mapping[str, Any], file: Path, *, device: str = "auto", precision: str = "auto"
) -> Model:
    """The model that these weights and this header describe, as they stand or would stand in `file`."""
    from diffkit.engine.devices import check_precision, choose_device, has_bfloat16
    from diffkit.engine.train import load_exactly

    settings = _with_defaults(validated(header["settings"], str(file)), file)
    spec = ImageSpec.from_dict(header["spec"])
    if settings.near and not spec.image_channels:
        raise DiffkitError(
            f"{file} cannot be used: its images are said to lie near others, but it takes none.",
            "Take another copy.",
            code=ExitCode.MODEL,
        )
    target = choose_device(device)
    if precision == "auto":
        # Never by timing: the same command has to make the same images.
        precision = "bfloat16" if target.type == "cuda" and has_bfloat16(target) else "float32"
    check_precision(precision, target)
    network = network_of(settings, spec)
    load_exactly(network, tensors)
    check_finite(network, file)
    network = for_sampling(network.to(target).eval().requires_grad_(False), spec, target, precision)
    return Model(
        settings=settings,
        spec=spec,
        mean=tuple(header["mean"]),
        denoiser=denoiser_of(network, settings, target, precision),
        device=target,
        images_seen=int(header["images_seen"]),
        sha256=str(header.get("sha256", "")),
        path=file,
    )


def check_finite(network: nn.Module, file: Path) -> None:
    """Raises DiffkitError (exit code 7) for a weight that is NaN or infinite."""
    import torch

    for name, weight in network.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise DiffkitError(
                f"{file} cannot be used: its weights {name} are not finite.",
                "The training diverged before they were written; use an earlier checkpoint.",
                code=ExitCode.MODEL,
            )


def _of_checkpoint(file: Path, *, device: str, precision: str, raw: bool) -> Model:
    """The averaged weights, or with `raw` those last trained, of a checkpoint; what they are of, its run says."""
    from diffkit.engine.modelfile import read_model_header, read_tensors
    from diffkit.engine.train import under

    tensors, header = read_tensors(file)
    run = file.parents[2]
    if not paths.exists(run / "model.safetensors"):
        raise DiffkitError(
            f"{file.parent} is a checkpoint without its run.", "Leave it inside its run.", code=ExitCode.MODEL
        )
    whole = {**read_model_header(run / "model.safetensors"), **header}
    return model_of(
        under(tensors, "network." if raw else "average."), whole, run / file.name, device=device, precision=precision
    )


def _with_defaults(settings: Settings, file: Path) -> Settings:
    """Sampling defaults that were chosen after training, from the run's `defaults.toml`."""
    path = file.parent / "defaults.toml"
    if not paths.exists(path):
        return settings
    from diffkit.config import read_toml

    sample = {**to_tables(settings)["sample"], **read_toml(path).get("sample", {})}
    return validated({**to_tables(settings), "sample": sample}, str(path))


def _raw_weights(file: Path) -> dict[str, Tensor]:
    from diffkit.engine.checkpoint import latest_checkpoint
    from diffkit.engine.train import under

    checkpoint, _ = latest_checkpoint(file.parent / "checkpoints")
    if checkpoint is None:
        raise DiffkitError(
            f"{file} holds averaged weights only.", "--raw needs the run's checkpoints.", code=ExitCode.MODEL
        )
    return under(checkpoint.tensors, "network.")
