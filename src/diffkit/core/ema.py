"""Averages of the weights over training: the running one, and those that are put together afterwards.

The second kind (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3):
the average of profile `p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1)` over the training up to t, of relative length
sigma_rel, the profile's standard deviation over t. Snapshots of two such averages span, nearly, those of other lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

LONGEST = 12**-0.5

WARM_UP = 0.05


def ema_decay(images_seen: int, batch: int, half_life: float) -> float:
    """The decay of one step of `batch` images, by which the average forgets half in `half_life` images.

    The half-life warms up: it is at most a twentieth of the images seen, so that early averages follow the weights
    and do not remember their random start (Karras et al. 2022, appendix F.2).
    """
    effective = min(half_life, WARM_UP * max(images_seen, 1))
    return float(0.5 ** (batch / effective))


class Average:
    """`module`, a copy of `network` that becomes a running average of its parameters; buffers are copied.

    Both have the same parameters for good, and buffers of the same names.
    """

    def __init__(self, module: nn.Module, network: nn.Module) -> None:
        self.module = module
        self._own: list[Tensor] = [*module.parameters()]
        self._parameters: list[Tensor] = [*network.parameters()]
        pairs = zip(module.modules(), network.modules(), strict=True)
        self._with_buffers = [(own, other, name) for own, other in pairs for name in own._buffers]

    @torch.no_grad()
    def update(self, decay: float, finite: Tensor | None = None) -> None:
        """Move the parameters towards those of the network.

        Where `finite`, one flag on their device, is false, nothing moves, and the network gets back its buffers.
        """
        if finite is None:
            torch._foreach_lerp_(self._own, self._parameters, 1 - decay)
        else:
            steps = list(torch._foreach_sub(self._parameters, self._own))
            torch._foreach_mul_(steps, finite * (1 - decay))
            torch._foreach_add_(self._own, steps)
        for target, source in self.buffers():
            if finite is not None:
                source.copy_(torch.where(finite, source, target))
            target.copy_(source)

    def buffers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each buffer as it is now, which a network may replace by another, and that of the network."""
        for own, other, name in self._with_buffers:
            target, source = own._buffers[name], other._buffers[name]
            if target is not None and source is not None:
                yield target, source


def power_decay(images_seen: int, batch: int, gamma: float) -> float:
    """The decay of one step of `batch` images, after which `images_seen` have been seen (section 3.1 there)."""
    return float((1 - batch / images_seen) ** (gamma + 1))


@cache
def gamma_of(length: float) -> float:
    """The exponent whose profile has relative length sigma_rel = ((g + 1) / ((g + 2)^2 (g + 3)))^1/2.

    Raises ValueError outside 0 < length <= 12^-1/2 = 0.289, the length of a plain mean.
    """
    if not 0 < length <= LONGEST:
        raise ValueError(f"a relative length lies between 0 and {LONGEST:.3f}")
    low, high = 0.0, 2 / length
    for _ in range(100):
        middle = (low + high) / 2
        longer = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > length**2
        low, high = (middle, high) if longer else (low, middle)
    return low


def overlap(t1: Tensor, gamma1: Tensor, t2: Tensor, gamma2: Tensor) -> Tensor:
    """The integral of the product of two profiles that end at t1 and t2 (appendix C there); broadcasts."""
    early, late = torch.minimum(t1, t2), torch.maximum(t1, t2)
    later_gamma = torch.where(t1 < t2, gamma2, gamma1)
    factor = (gamma1 + 1) * (gamma2 + 1) / (gamma1 + gamma2 + 1)
    return factor * (early / late) ** later_gamma / late


def combination(stored: Sequence[tuple[float, float]], wanted: tuple[float, float]) -> tuple[list[float], float]:
    """How much of each stored average makes the wanted one; each is (images seen, gamma).

    Least squares over the profiles, under weights that add up to 1, so that whatever did not change stays as it is.
    Returns the weights and the error to expect: the distance of the two profiles over the norm of the wanted one.
    """
    times, gammas = torch.tensor(stored, dtype=torch.float64).unbind(1)
    time, gamma = torch.tensor(wanted, dtype=torch.float64)
    times, time = times / time, torch.ones((), dtype=torch.float64)
    products = overlap(times[:, None], gammas[:, None], times, gammas)
    aims = overlap(times, gammas, time, gamma)
    scale = products.diagonal().rsqrt()
    # Profiles of unit norm, and a multiplier for the sum: symmetric, but close to singular, so by pseudo-inverse.
    matrix = torch.zeros(len(times) + 1, len(times) + 1, dtype=torch.float64)
    matrix[:-1, :-1] = products * scale[:, None] * scale
    matrix[-1, :-1] = matrix[:-1, -1] = scale
    right = torch.cat([aims * scale, torch.ones(1, dtype=torch.float64)])
    weights = (torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ right)[:-1] * scale
    own = overlap(time, gamma, time, gamma)
    squared = weights @ products @ weights - 2 * weights @ aims + own
    return weights.tolist(), float((squared.clamp(min=0) / own).sqrt())
