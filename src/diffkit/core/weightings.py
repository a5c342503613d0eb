"""Loss weightings: how much an error counts at each noise level.

Each is a function `(s, density, *, options)` that weighs the squared error of the clean estimate; SNR = 1 / s^2.
`density` is that of the training's noise levels, in log s: those that are defined for an even density divide by it.
"""

from __future__ import annotations

from torch import Tensor


def min_snr(s: Tensor, density: Tensor, *, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, "Efficient diffusion training via min-SNR weighting", section 3.4)."""
    return (s**-2).clamp(max=gamma)


def soft_min_snr(s: Tensor, density: Tensor, *, gamma: float = 4.0) -> Tensor:
    """SNR gamma / (SNR + gamma): min-SNR without its corner (Crowson et al. 2024, "HDiT", section 4.3)."""
    return gamma / (1 + gamma * s**2)


def p2(s: Tensor, density: Tensor, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """SNR / (k + SNR)^gamma (Choi et al. 2022, "Perception prioritized training", eq. 8)."""
    return s**-2 / (k + s**-2) ** gamma


def sigmoid(s: Tensor, density: Tensor, *, bias: float = 2.0) -> Tensor:
    """SNR sigmoid(bias - log SNR), whatever the training's density (Kingma and Gao 2023, section 4 and table 1;
    Hoogeboom et al. 2024, "Simpler diffusion")."""
    return s**-2 * (bias + 2 * s.log()).sigmoid() / density
