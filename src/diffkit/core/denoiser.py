"""The denoiser D(x, s): a network and a prediction type, joined; and the training objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffkit.interfaces import Coefficients

Condition: TypeAlias = "Mapping[str, Tensor]"


@dataclass(frozen=True)
class Denoiser:
    """`denoiser(x, s, condition)` estimates the clean images in `x = clean + s * noise`.

    Coefficients are computed in float64, one number per image, where s lies, and sent to the images' device as one
    small tensor; if all images are at one level they stay plain numbers, and nothing is sent. Only the network itself
    runs under `autocast`, a function that returns a context manager. `near`: images lie near the conditioning image,
    and what is denoised is the difference (as in Li et al. 2022, "SRDiff", section 3.2). `prediction` has to be
    hashable, as functions are.
    """

    network: nn.Module
    prediction: Callable[[Tensor], Coefficients]
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)
    near: bool = False

    def __call__(self, x: Tensor, s: float | Tensor, condition: Condition | None = None) -> Tensor:
        """x [B, C, H, W], s a float or float64 [B] -> the estimate of the clean images."""
        skip: float | Tensor
        out: float | Tensor
        inp: float | Tensor
        if isinstance(s, Tensor):
            levels = s.double().reshape(-1)
            skip, out, inp, c_noise = _rows(x, *self.prediction(levels), levels.log() / 4)
        else:
            skip, out, inp, level = _numbers(self.prediction, float(s))
            c_noise = torch.full((len(x),), level, dtype=x.dtype, device=x.device)
        if not self.near:
            return skip * x + out * self._network(inp * x, c_noise, condition)
        base = self.base(condition, x.shape[1])
        x = x - base
        return base + skip * x + out * self._network(inp * x, c_noise, condition)

    def residual(self, clean: Tensor, s: Tensor, noise: Tensor, condition: Condition | None = None) -> Tensor:
        """The error in the network's own output at x = clean + s * noise; times `out`, that of the clean estimate.

        The target (clean - skip * x) / out is formed from clean and noise, never from x: at small s the difference
        would lose its digits in float32.
        """
        skip, out, inp = self.prediction(s)
        signal, minus_noise = (1 - skip) / out, skip * s / out
        inp, c_noise, level, signal, minus_noise = _rows(clean, inp, s.log() / 4, s, signal, minus_noise)
        if self.near:
            clean = clean - self.base(condition, clean.shape[1])
        estimate = self._network(inp * (clean + level * noise), c_noise, condition)
        return estimate - (signal * clean - minus_noise * noise)

    @staticmethod
    def base(condition: Condition | None, channels: int) -> Tensor:
        """What images lie near: the conditioning image [B, C', H, W], of which one channel stands for all."""
        assert condition is not None
        image = condition["image"]
        return image[:, :channels] if image.shape[1] >= channels else image[:, :1]

    def _network(self, x: Tensor, c_noise: Tensor, condition: Condition | None) -> Tensor:
        with self.autocast():
            result: Tensor = self.network(x, c_noise.reshape(-1).expand(len(x)), **(condition or {}))
        return result.float() if x.dtype == torch.float32 else result


@lru_cache(maxsize=1024)
def _numbers(prediction: Callable[[Tensor], Coefficients], s: float) -> tuple[float, float, float, float]:
    """skip, out, inp and c_noise at one level."""
    level = torch.tensor([s], dtype=torch.float64)
    skip, out, inp = (float(each) for each in prediction(level))
    return skip, out, inp, float(level.log()) / 4


def _rows(like: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """float64 vectors [B] -> [B, 1, 1, 1] each on the device of `like`, in one transfer."""
    table = torch.stack(columns).to(like.dtype)
    return tuple(table.to(like.device, non_blocking=True)[..., None, None, None].unbind())


def squared_error(
    denoiser: Denoiser, clean: Tensor, s: Tensor, noise: Tensor, condition: Condition | None = None
) -> Tensor:
    """Default objective: mean squared error of the network's output, per image [B]."""
    return denoiser.residual(clean, s, noise, condition).square().flatten(1).mean(1)
