"""Guidance: denoisers made of denoisers. They compose, in this order: guidance, rescaling, thresholding."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffkit.interfaces import Denoise

ALWAYS = (0.0, math.inf)


def guided(
    denoise: Denoise,
    reference: Denoise,
    scale: float,
    *,
    interval: tuple[float, float] = ALWAYS,
    rescale: float = 0.0,
) -> Denoise:
    """From the reference through the denoiser and, above 1, beyond it; 1 = none.

    Classifier-free guidance when the reference is the model without its label (Ho and Salimans 2022, eq. 6, where
    scale = 1 + w); autoguidance when it is a worse model (Karras et al. 2024, "Guiding a diffusion model with a bad
    version of itself", eq. 3). Only at levels within the interval (Kynkaanniemi et al. 2024, section 3): elsewhere the
    reference is not called. `rescale`: see `rescaled`.
    """
    if scale == 1:
        return denoise

    def beyond(x: Tensor, s: float | Tensor) -> Tensor:
        plain = denoise(x, s)
        result = torch.lerp(reference(x, s), plain, scale)
        return rescaled(result, plain, rescale) if rescale else result

    if interval == ALWAYS:
        return beyond
    return chosen(lambda s: (s > interval[0]) & (s <= interval[1]), beyond, denoise)


def rescaled(guided: Tensor, plain: Tensor, share: float) -> Tensor:
    """The guided estimate with its contrast taken back towards that of the plain one (Lin et al. 2024, eq. 15, 16).

    Published for v-prediction from pure noise, where v is minus the clean image; here on the clean estimate at every
    level, so that it is the same for every prediction type.
    """
    ratio = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return guided * (1 + share * (ratio - 1))


def thresholded(denoise: Denoise, share: float) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): values beyond the `share` quantile are cut off there.

    The quantile is of each image's absolute values, at least 1; the estimate is divided by it.
    """

    def within(x: Tensor, s: float | Tensor) -> Tensor:
        clean = denoise(x, s)
        flat = clean.abs().flatten(1)
        # torch.quantile refuses more than 16 million values; the k-th smallest has no such limit.
        place = max(1, math.ceil(share * flat.shape[1]))
        limit = flat.kthvalue(place, dim=1).values.clamp(min=1.0)[:, None, None, None]
        return clean.clamp(-limit, limit) / limit

    return within


def chosen(where: Callable[[float | Tensor], bool | Tensor], one: Denoise, other: Denoise) -> Denoise:
    """`one` at the levels that `where` is true of, `other` elsewhere, each called only if it is needed."""

    def either(x: Tensor, s: float | Tensor) -> Tensor:
        found = torch.as_tensor(where(s))
        if bool(found.all()):
            return one(x, s)
        if not bool(found.any()):
            return other(x, s)
        return torch.where(found.to(x.device)[:, None, None, None], one(x, s), other(x, s))

    return either
