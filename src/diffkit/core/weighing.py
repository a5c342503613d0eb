"""From an error to a loss: by a fixed weighting, by a learned one, or both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffkit.interfaces import Coefficients

Weigh: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""`(error [B] of the network's output, s float64 [B], on the CPU or with the error) -> loss [B]`."""


def by_weighting(
    weighting: Callable[[Tensor, Tensor], Tensor],
    density: Callable[[Tensor], Tensor],
    prediction: Callable[[Tensor], Coefficients],
    levels: Callable[[Tensor], Tensor],
) -> Weigh:
    """Errors of the network's output as weighted errors of the clean estimate, which are `out^2` times as large.

    `levels` are those of training; over them the factors have a mean of 1, so that the weighting changes what the
    network looks at but not the size of the loss, which gradient clipping depends on.
    """

    def factors(s: Tensor) -> Tensor:
        return weighting(s, density(s)) * prediction(s).out ** 2

    mean = factors(levels((torch.arange(1024, dtype=torch.float64) + 0.5) / 1024)).mean()

    def weigh(error: Tensor, s: Tensor) -> Tensor:
        return error * (factors(s) / mean).to(error.dtype).to(error.device, non_blocking=True)

    return weigh


class Uncertainty(nn.Module):
    """A learned weighting: the loss is `error / exp(u(s)) + u(s)`, so u becomes the logarithm of the expected error.

    Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", after Kendall et al. 2018,
    "Multi-task learning using uncertainty": every noise level then counts equally, whatever the network makes of it.
    One linear layer over Fourier features of log(s) / 4; it is no part of the model.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 6.28 * torch.randn(features, generator=generator))
        self.register_buffer("phases", 6.28 * torch.rand(features, generator=generator))
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, error: Tensor, s: Tensor) -> Tensor:
        """error [B], s float64 [B], on the CPU or with the error -> loss [B]."""
        c_noise = (s.log() / 4).to(error.dtype).to(error.device, non_blocking=True)
        u: Tensor = self.linear((c_noise[:, None] * self.frequencies + self.phases).cos())[:, 0]
        return error * (-u).exp() + u
