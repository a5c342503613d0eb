"""A trained model: loaded from its file, asked for images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit.compose.parts import bound, completed, denoiser_of, levels
from diffkit.config import PartChoice, Settings, to_tables, validated
from diffkit.errors import DiffkitError, ExitCode, did_you_mean, nearest_sibling
from diffkit.interfaces import ImageSpec
from diffkit.rundir import RunDir

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.sample import Images, Plan


@dataclass(frozen=True, repr=False)
class Model:
    """A trained model, ready to make images."""

    settings: Settings
    spec: ImageSpec
    mean: tuple[float, ...]
    denoiser: Denoiser
    device: torch.device
    images_seen: int
    sha256: str = ""

    def __repr__(self) -> str:
        spec, parameters = self.spec, sum(p.numel() for p in self.denoiser.network.parameters())
        return f"<Model {spec}, {parameters / 1e6:.1f}M parameters, {self.images_seen:,} images seen, on {self.device}>"

    def sample(
        self,
        count: int,
        *,
        seed: int = 0,
        classes: Sequence[str] | None = None,
        sampler: str | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int | None = None,
    ) -> npt.NDArray[np.uint8]:
        """`count` new images, uint8 [N, H, W, C]. `classes` are taken in turn; image i depends on seed and i only.

        Raises DiffkitError for an unknown class, sampler or schedule.
        """
        import numpy as np

        plan = self.plan(sampler=sampler, scheduler=scheduler, steps=steps, guidance=guidance, seed=seed)
        batches = self.generate(plan, range(count), self.class_indices(classes), batch_size=batch_size)
        shape = (0, self.spec.height, self.spec.width, self.spec.channels)
        return np.concatenate([np.zeros(shape, np.uint8), *(batch.pixels for batch in batches)])

    def plan(
        self,
        *,
        sampler: str | None = None,
        scheduler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
    ) -> Plan:
        """Names to functions; what is None follows the model's own settings."""
        from diffkit.core.schedules import sampling_grid
        from diffkit.engine.sample import Plan

        defaults = self.settings.sample
        parts = self.settings.parts
        chosen, function = completed("samplers", _choice(sampler, defaults.sampler), versions=parts.get("sampler"))
        grid, shape = completed("schedules", _choice(scheduler, defaults.scheduler), versions=parts.get("grid"))
        steps = defaults.steps if steps is None else steps
        guidance = defaults.guidance if guidance is None else guidance
        if steps < 1:
            raise DiffkitError(f"{steps} steps make no image.", "Choose --steps 1 or more.")
        if guidance != 1 and not self.spec.classes:
            raise DiffkitError("This model knows no classes: there is nothing to guide it to.", "Leave guidance out.")
        if not math.isfinite(guidance):
            raise DiffkitError(f"A guidance of {guidance} makes no image.", "1 is none; try 1.5.")
        return Plan(
            sampler=function,
            sigmas=sampling_grid(levels(shape, self.settings), steps),
            mean=self.mean,
            guidance=guidance,
            seed=seed,
            names={"sampler": str(chosen), "scheduler": str(grid), "steps": steps},
        )

    def generate(
        self,
        plan: Plan,
        indices: Sequence[int],
        classes: Sequence[int] | None = None,
        *,
        batch_size: int | None = None,
    ) -> Iterator[Images]:
        """Image number i for each of `indices`, in batches; image i has class `classes[i % len(classes)]`."""
        from diffkit.engine.sample import sample

        labels = [classes[i % len(classes)] for i in indices] if classes else None
        batch_size = batch_size or self.default_batch
        return sample(self.denoiser, self.spec, plan, indices, labels, batch_size=batch_size)

    def trajectory(self, count: int, seed: int = 0) -> Iterator[tuple[float, npt.NDArray[np.uint8]]]:
        """The first images on their way from noise: after each step its noise level and uint8 [N, H, W, C].

        Classes are taken in turn. Noise is shown in proportion: what is too bright for a picture is scaled down.
        """
        from diffkit.engine.sample import trajectory

        classes = [index % len(self.spec.classes) for index in range(count)] if self.spec.classes else None
        return trajectory(self.denoiser, self.spec, self.plan(seed=seed), range(count), classes)

    @property
    def default_batch(self) -> int:
        """Images at once: enough to keep the device busy, few enough to fit."""
        most = 64 if self.device.type == "cpu" else 256
        return min(most, max(4, 4 * most * 2**10 // (self.spec.height * self.spec.width)))

    def class_indices(self, names: Sequence[str] | None) -> list[int] | None:
        """Class names to indices. Raises DiffkitError if the model knows no such class."""
        if names is None:
            return None
        if not self.spec.classes:
            raise DiffkitError("This model knows no classes.", "It was trained without labels; leave --class out.")
        for name in names:
            if name not in self.spec.classes:
                near = did_you_mean(name, self.spec.classes)
                raise DiffkitError(f"No class '{name}'.", f"{near}It knows: {', '.join(self.spec.classes)}.")
        return [self.spec.classes.index(name) for name in names]


def _choice(text: str | None, default: PartChoice) -> PartChoice:
    return default if text is None else PartChoice.model_validate(text)


def model_path(path: str | Path) -> Path:
    """The model file of a run directory, or the file itself. Raises DiffkitError if there is none."""
    path = Path(path)
    if path.is_dir() and (path / "model.safetensors").exists():
        return path / "model.safetensors"
    if path.is_file():
        return path
    if RunDir(path).exists:
        raise DiffkitError(
            f"The run {path} has saved no model yet.",
            "Let it train until its first checkpoint.",
            code=ExitCode.MODEL,
        )
    if path.exists():
        hint = "A run has a model.safetensors inside it."
        if (path / "dataset.json").exists():
            hint = f"It is a prepared data set: train on it with: diffkit train {path}."
        raise DiffkitError(f"{path} is neither a run nor a model.", hint, code=ExitCode.MODEL)
    raise DiffkitError(f"There is no {path}.", nearest_sibling(path).strip(), code=ExitCode.MODEL)


def load_model(path: str | Path, *, device: str = "auto", precision: str = "auto", raw: bool = False) -> Model:
    """See `diffkit.load`."""
    from diffkit.engine.modelfile import read_model

    file = model_path(path)
    tensors, header = read_model(file)
    return model_of(_raw_weights(file) if raw else tensors, header, file, device=device, precision=precision)


def model_of(
    tensors: dict[str, Tensor], header: Mapping[str, Any], file: Path, *, device: str = "auto", precision: str = "auto"
) -> Model:
    """The model that these weights and this header describe, as they stand or would stand in `file`."""
    import torch

    from diffkit.engine.devices import choose_device
    from diffkit.engine.train import load_exactly

    settings = _with_defaults(validated(header["settings"], str(file)), file)
    spec = ImageSpec.from_dict(header["spec"])
    target = choose_device(device)
    if precision == "auto":
        # Never by timing: the same command has to make the same images.
        half = target.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if half else "float32"
    network = bound("backbone", settings)(spec)
    load_exactly(network, tensors)
    # On a CPU, with the channels last: up to a fifth faster at 128 pixels, about the same at 16.
    layout = torch.channels_last if target.type == "cpu" else torch.contiguous_format
    network.to(target, memory_format=layout).eval().requires_grad_(False)
    return Model(
        settings=settings,
        spec=spec,
        mean=tuple(header["mean"]),
        denoiser=denoiser_of(network, settings, target, precision),
        device=target,
        images_seen=int(header["images_seen"]),
        sha256=str(header.get("sha256", "")),
    )


def _with_defaults(settings: Settings, file: Path) -> Settings:
    """Sampling defaults that were chosen after training, from the run's `defaults.toml`."""
    path = file.parent / "defaults.toml"
    if not path.exists():
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
