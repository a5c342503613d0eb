"""Parts by name: found, completed with their options, bound; and the denoiser made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffkit.config import PartChoice, Settings, resolve_options
from diffkit.errors import DiffkitError, ExitCode
from diffkit.interfaces import ImageSpec
from diffkit.registry import Part, registry, word

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from diffkit.core.denoiser import Denoiser

PART_KINDS = {"scheduler": "schedules", "prediction": "predictions", "backbone": "backbones"}


def find(kind: str, choice: PartChoice, versions: Mapping[str, Mapping[str, str]] | None = None) -> Part:
    """The part of that name. If it is gone, the error says which `pip install` brings it back."""
    try:
        return registry().find(kind, choice.name)
    except DiffkitError as error:
        known = (versions or {}).get(word(kind), {})
        if known.get("distribution", "diffkit") == "diffkit":
            raise
        raise DiffkitError(
            f"The {word(kind)} '{choice.name}' comes from the plugin {known['distribution']} "
            f"{known['version']}, which is not installed here.",
            f"Install it: pip install '{known['distribution']}=={known['version']}'.",
            code=ExitCode.MODEL,
        ) from error


def completed(
    kind: str,
    choice: PartChoice,
    context: Mapping[str, Any] | None = None,
    versions: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[PartChoice, Callable[..., Any]]:
    """The choice with all its options, types checked, and the function with those options bound."""
    part = find(kind, choice, versions)
    label = f"{word(kind).capitalize()} {choice.name}"
    options = resolve_options(label, part.function, choice.options, context)
    return PartChoice(name=choice.name, options=options), partial(part.function, **options)


def bound(kind: str, choice: PartChoice, versions: Mapping[str, Mapping[str, str]]) -> Callable[..., Any]:
    """The function of a part whose options were recorded."""
    part = find(kind, choice, versions)
    options = resolve_options(f"{word(kind).capitalize()} {choice.name}", part.function, choice.options)
    return partial(part.function, **options)


def levels(choice: PartChoice, settings: Settings, shift: float = 1.0) -> Callable[[Tensor], Tensor]:
    """A schedule carried onto the model's own range of noise levels."""
    from diffkit.core.schedules import over_range

    schedule = bound("schedules", choice, settings.parts)
    assert settings.noise.s_max is not None
    return over_range(schedule, settings.noise.s_min, settings.noise.s_max, shift)


def denoiser_of(network: nn.Module, settings: Settings, device: torch.device, precision: str = "") -> Denoiser:
    from diffkit.core.denoiser import Denoiser
    from diffkit.engine.devices import autocast

    prediction = bound("predictions", settings.prediction, settings.parts)
    return Denoiser(network, prediction, autocast(device, precision or settings.train.precision))


def dummy_inputs(spec: ImageSpec, batch: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Inputs of the right shapes: x and c_noise, and the condition."""
    import torch

    x = torch.zeros(batch, spec.channels, spec.height, spec.width, device=device)
    condition = {}
    if spec.classes:
        condition["label"] = torch.zeros(batch, spec.label_width, device=device)
    if spec.image_channels:
        condition["image"] = torch.zeros(batch, spec.image_channels, spec.height, spec.width, device=device)
    return (x, torch.zeros(batch, device=device)), condition


def versions(settings: Settings) -> dict[str, dict[str, str]]:
    """For each part that the model needs: the distribution and version that brought it."""
    parts = {key: find(kind, getattr(settings, key)) for key, kind in PART_KINDS.items()}
    return {key: {"distribution": part.distribution, "version": part.version} for key, part in parts.items()}
