"""Prediction types: plain squared error in the network's output space is the published loss of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diffkit.core import predictions
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.testing import check_prediction

SD = 0.58
Published = Callable[["Fixed", Tensor, Tensor, Tensor], Tensor]


class Fixed(nn.Module):
    """Any fixed function of x and c_noise will do for an identity between losses."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1, dtype=dtype)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        result: Tensor = torch.tanh(self.conv(x)) * (1 + c_noise[:, None, None, None])
        return result


def mean(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def angles(s: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma with alpha^2 + sigma^2 = 1."""
    return 1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()


def ddpm_eps(network: Fixed, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = angles(s)
    return mean(noise - network(alpha * clean + sigma * noise, s.log().flatten() / 4))


def ddpm_x0(network: Fixed, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = angles(s)
    return mean(clean - network(alpha * clean + sigma * noise, s.log().flatten() / 4))


def salimans_v(network: Fixed, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = angles(s)
    return mean(alpha * noise - sigma * clean - network(alpha * clean + sigma * noise, s.log().flatten() / 4))


def rectified_flow(network: Fixed, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    t = s / (1 + s)
    return mean(noise - clean - network((1 - t) * clean + t * noise, s.log().flatten() / 4))


def edm(network: Fixed, clean: Tensor, s: Tensor, noise: Tensor) -> Tensor:
    """lambda(sigma) ||D(y + n; sigma) - y||^2 with table 1's preconditioning."""
    x = clean + s * noise
    skip, out = SD**2 / (s**2 + SD**2), s * SD / (s**2 + SD**2).sqrt()
    denoised = skip * x + out * network(x / (s**2 + SD**2).sqrt(), s.log().flatten() / 4)
    weight = (s**2 + SD**2) / (s * SD) ** 2
    return weight.flatten() * mean(denoised - clean)


CASES: dict[str, tuple[Callable[..., predictions.Coefficients], Published]] = {
    "eps": (predictions.eps, ddpm_eps),
    "x0": (predictions.x0, ddpm_x0),
    "v": (predictions.v, salimans_v),
    "flow": (predictions.flow, rectified_flow),
    "edm": (partial(predictions.edm, sigma_data=SD), edm),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CASES)
def test_loss_equals_the_published_one(name: str, dtype: torch.dtype, tolerance: float) -> None:
    prediction, published = CASES[name]
    torch.manual_seed(1)
    s = torch.logspace(-2.7, 2.5, 40, dtype=torch.float64)
    clean = torch.rand(40, 3, 8, 8, dtype=torch.float64) * 2 - 1
    noise = torch.randn(40, 3, 8, 8, dtype=torch.float64)
    expected = published(Fixed(torch.float64), clean, s[:, None, None, None], noise)
    network = Fixed(torch.float64).to(dtype)
    found = squared_error(Denoiser(network, prediction), clean.to(dtype), s, noise.to(dtype), {})
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("name", CASES)
def test_every_prediction_keeps_the_contract(name: str) -> None:
    check_prediction(getattr(predictions, name))


def test_denoiser_recovers_the_clean_image_from_a_perfect_network() -> None:
    clean, noise = torch.rand(5, 3, 4, 4) * 2 - 1, torch.randn(5, 3, 4, 4)
    s = torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0], dtype=torch.float64)

    class Perfect(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            assert torch.allclose(c_noise.double(), s.log() / 4)
            alpha, sigma = angles(s.float()[:, None, None, None])
            return alpha * noise - sigma * clean

    x = clean + s.float()[:, None, None, None] * noise
    found = Denoiser(Perfect(), predictions.v)(x, s)
    # At s = 100 x itself has only 1e-5 of absolute precision left.
    torch.testing.assert_close(found, clean, rtol=0, atol=5e-5)
