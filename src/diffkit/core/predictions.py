"""Prediction types: what the network estimates, as three numbers per noise level.

In the coordinate x = clean + s * noise every published parameterisation is `clean = skip * x + out * network(inp * x)`.
Plain squared error in the network's output space is the published loss of each. s is float64: 1 - skip cancels at
small s, and there are only as many numbers as images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.interfaces import Coefficients


def eps(s: Tensor) -> Coefficients:
    """The noise (Ho et al. 2020, eq. 14); the network sees alpha * clean + sigma * noise, alpha^2 + sigma^2 = 1."""
    return Coefficients(torch.ones_like(s), -s, _variance_preserving(s))


def x0(s: Tensor) -> Coefficients:
    """The clean image (Ho et al. 2020, section 3.2; Salimans and Ho 2022)."""
    return Coefficients(torch.zeros_like(s), torch.ones_like(s), _variance_preserving(s))


def v(s: Tensor) -> Coefficients:
    """v = alpha * noise - sigma * clean (Salimans and Ho 2022, section 4)."""
    inp = _variance_preserving(s)
    return Coefficients(inp**2, -s * inp, inp)


def flow(s: Tensor) -> Coefficients:
    """The velocity noise - clean along straight lines, t = s / (1 + s) (Liu et al. 2022; Lipman et al. 2023)."""
    inp = 1 / (1 + s)
    return Coefficients(inp, -s * inp, inp)


def edm(s: Tensor, *, sigma_data: float) -> Coefficients:
    """Input and target of unit variance for data of root mean square sigma_data (Karras et al. 2022, table 1)."""
    total = s**2 + sigma_data**2
    return Coefficients(sigma_data**2 / total, s * sigma_data * total.rsqrt(), total.rsqrt())


def _variance_preserving(s: Tensor) -> Tensor:
    return (1 + s**2).rsqrt()
