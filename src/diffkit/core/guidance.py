"""Guidance: a denoiser made of two others."""

from __future__ import annotations

from torch import Tensor

from diffkit.interfaces import Denoise


def guided(denoise: Denoise, reference: Denoise, scale: float) -> Denoise:
    """From the reference through the denoiser and, above 1, beyond it; 1 = none.

    Classifier-free guidance when the reference is the model without its label (Ho and Salimans 2022, eq. 6, where
    scale = 1 + w); autoguidance when it is a worse model (Karras et al. 2024).
    """
    if scale == 1:
        return denoise

    def combined(x: Tensor, s: float) -> Tensor:
        return reference(x, s).lerp(denoise(x, s), scale)

    return combined
