"""Loss weightings against the published ones, and the learned one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from diffkit.core import predictions, weightings
from diffkit.core.schedules import cosine, density, karras, loglinear, over_range
from diffkit.core.weighing import Uncertainty, by_weighting
from diffkit.testing import check_weighting

S = torch.logspace(-3, 3, 40, dtype=torch.float64)
SNR = S**-2
ALL = ["min_snr", "soft_min_snr", "p2", "sigmoid"]


@pytest.mark.parametrize("name", ALL)
def test_every_weighting_keeps_the_contract(name: str) -> None:
    check_weighting(getattr(weightings, name))


def relative(found: Tensor, wanted: Tensor) -> None:
    """Equal up to a factor."""
    torch.testing.assert_close(found / found.sum(), wanted / wanted.sum())


def test_as_weights_of_the_published_losses() -> None:
    """The error of eps is SNR times that of the clean image, that of v is SNR + 1 times."""
    one = torch.ones_like(S)
    # min-SNR: min(SNR, gamma) / SNR on eps, min(SNR, gamma) / (SNR + 1) on v.
    relative(weightings.min_snr(S, one), torch.minimum(SNR, 5 * one) / SNR * SNR)
    relative(weightings.min_snr(S, one), torch.minimum(SNR, 5 * one) / (SNR + 1) * (SNR + 1))
    # P2: 1 / (k + SNR)^gamma on eps.
    relative(weightings.p2(S, one, gamma=0.5), SNR * (1 + SNR) ** -0.5)
    # Sigmoid: on eps, sigmoid(bias - log SNR) per unit of log SNR.
    relative(weightings.sigmoid(S, one, bias=1.0), SNR / (1 + torch.exp(SNR.log() - 1.0)))
    # Soft min-SNR follows min-SNR away from its corner.
    ratio = weightings.soft_min_snr(S, one, gamma=5.0) / weightings.min_snr(S, one, gamma=5.0)
    assert float(ratio[0]) == pytest.approx(1, abs=1e-3) and float(ratio[-1]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("shape", [cosine, karras, loglinear])
def test_the_density_is_that_of_the_levels(shape) -> None:  # type: ignore[no-untyped-def]
    levels = over_range(shape, 0.01, 50.0)
    found = density(levels)
    logs = torch.linspace(-4.5, 3.8, 2000, dtype=torch.float64)
    assert float(torch.trapezoid(found(logs.exp()), logs)) == pytest.approx(1, abs=0.05)
    drawn = levels(torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).log()
    for low, high in ((-4.0, -3.0), (-1.0, 0.0), (1.0, 3.0)):
        share = float(((drawn > low) & (drawn < high)).double().mean())
        inside = torch.linspace(low, high, 500, dtype=torch.float64)
        assert float(torch.trapezoid(found(inside.exp()), inside)) == pytest.approx(share, abs=0.01)


def test_a_weighted_loss_is_the_weighted_error_of_the_clean_image_with_mean_one() -> None:
    levels = over_range(cosine, 0.01, 50.0)
    prediction = partial(predictions.edm, sigma_data=0.5)
    weigh = by_weighting(weightings.min_snr, density(levels), prediction, levels)
    s = levels((torch.arange(500, dtype=torch.float64) + 0.5) / 500)
    loss = weigh(torch.ones(500), s).double()
    assert float(loss.mean()) == pytest.approx(1, rel=0.02)
    relative(loss, (s**-2).clamp(max=5.0) * prediction(s).out ** 2)


def test_the_learned_weighting_finds_the_expected_error() -> None:
    """exp(u(s)) becomes the mean error at s, so that every level's loss is 1 + u."""
    module = Uncertainty()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)

    def truth(s: Tensor) -> Tensor:
        return (0.1 + 0.9 / (1 + s**2)).float()

    for _ in range(1500):
        s = torch.exp(torch.rand(256, generator=generator, dtype=torch.float64) * 8 - 4)
        noisy = truth(s) * torch.rand(256, generator=generator) * 2
        optimizer.zero_grad()
        module(noisy, s).mean().backward()
        optimizer.step()
    s = torch.tensor([0.05, 0.3, 1.0, 4.0, 20.0], dtype=torch.float64)
    u = module(torch.zeros(5), s)
    torch.testing.assert_close(u.exp(), truth(s), rtol=0.15, atol=0)
