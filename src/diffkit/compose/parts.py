"""Parts by name: found, completed with their options, bound; and the denoiser made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from diffkit.compose.trial import check_levels, check_prediction, first_use
from diffkit.config import PartChoice, Settings, resolve_options
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from diffkit.registry import Part, registry, word

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.batches import Task

    Inputs: TypeAlias = tuple[tuple[Tensor, Tensor], dict[str, Tensor]]

PART_KINDS = {
    "scheduler": "schedules",
    "prediction": "predictions",
    "backbone": "backbones",
    "weighting": "weightings",
    "task": "tasks",
}
Origin: TypeAlias = Mapping[str, str]


def find(kind: str, choice: PartChoice, origin: Origin | None = None) -> Part:
    """The part of that name. If it is gone, `origin` (name, distribution, version) says what brings it back."""
    try:
        return registry().find(kind, choice.name)
    except DiffkitError as error:
        if not origin or origin.get("name") != choice.name or origin.get("distribution", "diffkit") == "diffkit":
            raise
        raise DiffkitError(
            f"The {word(kind)} '{choice.name}' comes from the plugin {origin['distribution']} "
            f"{origin['version']}, which is not installed here.",
            f"Install it: pip install '{origin['distribution']}=={origin['version']}'.",
            code=ExitCode.MODEL,
        ) from error


def completed(
    kind: str, choice: PartChoice, context: Mapping[str, Any] | None = None, versions: Origin | None = None
) -> tuple[PartChoice, Callable[..., Any]]:
    """The choice with all its options, types checked, and the function with those options bound.

    Options that are not given come from `context` (sigma_data, from the data), then from their defaults.
    """
    function = find(kind, choice, versions).function
    options = resolve_options(f"{word(kind).capitalize()} {choice.name}", function, choice.options, context)
    return PartChoice(name=choice.name, options=options), partial(function, **options)


def bound(key: str, settings: Settings) -> Callable[..., Any]:
    """The function that settings.scheduler, .prediction, ... (`key`) names, with its recorded options."""
    return completed(PART_KINDS[key], getattr(settings, key), versions=settings.parts.get(key))[1]


def chosen_parts(settings: Settings) -> dict[str, PartChoice]:
    """The parts that the settings name; a weighting and a task there may be or not."""
    choices = {key: getattr(settings, key) for key in PART_KINDS}
    return {key: choice for key, choice in choices.items() if choice is not None}


def task_of(settings: Settings) -> Task | None:
    """What makes the conditioning image, if there is one."""
    return None if settings.task is None else bound("task", settings)


def trait(function: Callable[..., Any], name: str) -> bool:
    """Whether a part says this of itself, as an attribute of its function."""
    return bool(getattr(function.func if isinstance(function, partial) else function, name, False))


def levels(
    choice: PartChoice, schedule: Callable[..., Any], settings: Settings, shift: float = 1.0
) -> Callable[[Tensor], Tensor]:
    """A schedule carried onto the model's own range of noise levels. Raises DiffkitError if it lies outside it."""
    from diffkit.core.schedules import over_range

    assert settings.noise.s_max is not None
    with first_use("schedules", choice):
        ranged = over_range(schedule, settings.noise.s_min, settings.noise.s_max, shift)
    check_levels(choice, ranged)
    return ranged


def network_of(settings: Settings, spec: ImageSpec) -> nn.Module:
    """The backbone's network for these images. Raises DiffkitError if its options make none."""
    with first_use("backbones", settings.backbone):
        network: nn.Module = bound("backbone", settings)(spec)
    return network


def denoiser_of(network: nn.Module, settings: Settings, device: torch.device, precision: str) -> Denoiser:
    """Network and prediction type, joined, under the precision."""
    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.devices import autocast

    prediction = bound("prediction", settings)
    check_prediction(settings.prediction, prediction)
    return Denoiser(network, prediction, autocast(device, precision), bool(settings.near))


def trial_network(
    settings: Settings, spec: ImageSpec, *, run: bool = True
) -> tuple[nn.Module, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The network and inputs for one image, without memory where the backbone allows it: to count and to measure.

    `run`: make sure that it also runs on them; that loads torch's compiler.
    """
    import torch

    try:
        with torch.device("meta"):
            network = network_of(settings, spec)
        inputs, condition = dummy_inputs(spec, 1, torch.device("meta"))
        if run:
            network(*inputs, **condition)
    except Exception:
        # A backbone that needs real numbers while it is built or run.
        network = network_of(settings, spec)
        inputs, condition = dummy_inputs(spec, 1, torch.device("cpu"))
    return network, inputs, condition


def dummy_inputs(spec: ImageSpec, batch: int, device: torch.device) -> Inputs:
    """Inputs of the right shapes: x and c_noise, and the condition."""
    import torch

    x = torch.zeros(batch, spec.channels, spec.height, spec.width, device=device)
    condition = {}
    if spec.label_width:
        condition["label"] = torch.zeros(batch, spec.label_width, device=device)
    if spec.image_channels:
        condition["image"] = torch.zeros(batch, spec.image_channels, spec.height, spec.width, device=device)
    return (x, torch.zeros(batch, device=device)), condition


def recorded(settings: Settings) -> dict[str, dict[str, str]]:
    """For each part: its name, and the distribution and version that brought it. The sampling schedule is `grid`."""
    choices = {key: (PART_KINDS[key], choice) for key, choice in chosen_parts(settings).items()}
    choices |= {"sampler": ("samplers", settings.sample.sampler), "grid": ("schedules", settings.sample.scheduler)}
    found = {key: find(kind, choice) for key, (kind, choice) in choices.items()}
    return {
        key: {"name": choices[key][1].name, "distribution": part.distribution, "version": part.version}
        for key, part in found.items()
    }
