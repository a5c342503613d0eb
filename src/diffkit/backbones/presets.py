"""Sizes of the U-Net by name, fitted to the size of the images."""

from __future__ import annotations

import math
from typing import Any

from diffkit.errors import DiffkitError, did_you_mean
from diffkit.interfaces import ImageSpec

PRESETS = ("tiny", "small", "base", "large")


def unet_preset(name: str, spec: ImageSpec) -> dict[str, Any]:
    """The options of `unet` that `name` stands for at this image size.

    tiny: minutes on a CPU; small: a small GPU or a small folder; base: one good GPU; large: a big one and time.
    Raises DiffkitError if there is no such preset.
    """
    width, blocks = _size(name)
    side = max(spec.height, spec.width)
    # Folding pixels into channels moves most of the work to a lower resolution; big images need it first.
    patch = {"tiny": 2 if side < 96 else 4, "small": 1 if side < 48 else 2}.get(name, 1 if side < 96 else 2)
    patch *= max(1, side // 256)
    # Without attention, only a last stage of few positions sees the image whole.
    lowest = 4 if name == "tiny" else 8
    return {
        "width": width,
        "multipliers": _multipliers(side / patch, lowest),
        "blocks": blocks,
        # On a CPU one attention costs as much as two convolutions, and small images are seen whole without it.
        "attention": 16 if name != "tiny" else 8 if side >= 64 else 0,
        "patch": patch,
        "resample": "plain",
        "skips": "add",
    }


def classic_preset(name: str, spec: ImageSpec) -> dict[str, Any]:
    """The options of `unet_classic`: the same widths and blocks, from full resolution, as DDPM and ADM have them.

    Raises DiffkitError if there is no such preset.
    """
    width, blocks = _size(name)
    side = max(spec.height, spec.width)
    return {"width": width, "multipliers": _multipliers(side, 8), "blocks": blocks, "attention": 16, "patch": 1}


def _size(name: str) -> tuple[int, int]:
    """Width and blocks."""
    if name not in PRESETS:
        raise DiffkitError(f"No preset '{name}'.", f"{did_you_mean(name, PRESETS)}There are {', '.join(PRESETS)}.")
    return {"tiny": (64, 1), "small": (64, 2), "base": (128, 2), "large": (192, 3)}[name]


def _multipliers(side: float, lowest: int) -> tuple[int, ...]:
    """For stages from this side down to one of about `lowest` positions, two at least."""
    return (1, 2, 2, 2, 4, 4, 4)[: max(2, round(math.log2(side / lowest)) + 1)]
