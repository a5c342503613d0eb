"""diffkit: from a folder of images to a diffusion model that makes more of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from diffkit.compose import Model

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl", "load"]

hookimpl = pluggy.HookimplMarker("diffkit")


def load(path: str | Path, *, device: str = "auto", precision: str = "auto", raw: bool = False) -> Model:
    """A trained model, from a run directory or a `model.safetensors`; see `diffkit.compose.Model`.

    `raw=True` loads the weights as last trained instead of their average (needs the run's checkpoint).
    Raises DiffkitError if the file is missing or damaged, or if a plugin that it needs is not installed.
    """
    from diffkit.compose import load_model

    return load_model(path, device=device, precision=precision, raw=raw)
