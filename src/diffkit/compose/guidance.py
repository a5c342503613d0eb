"""What people ask of guidance, checked against the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffkit.config import MOST_GUIDANCE
from diffkit.errors import DiffkitError

if TYPE_CHECKING:
    from diffkit.compose.model import Model
    from diffkit.engine.sample import Guidance


def guidance_of(
    model: Model,
    *,
    scale: float,
    guide: Model | None,
    guide_scale: float,
    interval: tuple[float, float] | None,
    rescale: float,
    threshold: float | None,
) -> Guidance:
    """Raises DiffkitError for what the model cannot do, and for numbers that make no image."""
    from diffkit.core.guidance import ALWAYS
    from diffkit.engine.sample import Guidance

    for value in (scale, guide_scale):
        if not abs(value) <= MOST_GUIDANCE:
            raise DiffkitError(f"A guidance of {value} makes no image.", "1 is none; try 1.5.")
    if scale != 1 and not model.spec.label_width:
        raise DiffkitError(
            "This model knows no classes: there is nothing to guide it to.",
            "Leave --guidance out, or guide it away from a worse model: --guide RUN_OR_CHECKPOINT.",
        )
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise DiffkitError(
            f"Guidance between {interval[0]:g} and {interval[1]:g} is none.", "Give two noise levels, such as 0.2,5."
        )
    if not 0 <= rescale <= 1:
        raise DiffkitError(f"guidance-rescale = {rescale:g} is no share.", "0 is none, 0.7 usual, 1 all of it.")
    if threshold is not None and not 0.5 <= threshold <= 1:
        raise DiffkitError(f"threshold = {threshold:g} is no share of the pixels.", "0.995 is usual.")
    if scale == 1 and guide is None and (rescale or interval is not None):
        raise DiffkitError("Nothing is guided here.", "--guidance-interval and -rescale need --guidance or --guide.")
    if guide is not None:
        _check_guide(model, guide)
    return Guidance(
        scale=scale,
        guide=None if guide is None else guide.denoiser,
        guide_scale=guide_scale,
        interval=interval or ALWAYS,
        rescale=rescale,
        threshold=threshold,
    )


def _check_guide(model: Model, guide: Model) -> None:
    mine, other = model.spec, guide.spec
    shape, others = ((spec.height, spec.width, spec.channels) for spec in (mine, other))
    if shape != others:
        raise DiffkitError(
            f"The guide makes images of {other.height}x{other.width}x{other.channels}, "
            f"the model of {mine.height}x{mine.width}x{mine.channels}.",
            "Take an earlier checkpoint of the same run, or a smaller network trained on the same data.",
        )
    if other.label_width and (mine.classes, mine.attributes) != (other.classes, other.attributes):
        raise DiffkitError(
            "The guide was trained with other labels than the model.",
            "Take a guide that was trained on the same data, with or without labels.",
        )
    if mine.image_channels != other.image_channels:
        raise DiffkitError("The guide does another task than the model.", "Take a guide of the same task.")
