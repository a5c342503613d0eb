"""The schedule is the published one, and keeps diffkit's contract."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import diffkit_laplace
import pytest
import torch
from diffkit_laplace import laplace

from diffkit.errors import DiffkitError
from diffkit.testing import check_schedule


@pytest.mark.parametrize("options", [{}, {"mu": 1.5}, {"mu": -2.0, "b": 1.0}, {"b": 0.1}])
def test_it_keeps_the_contract_of_a_schedule(options: dict[str, float]) -> None:
    check_schedule(laplace, **options)


@pytest.mark.parametrize(("mu", "b"), [(0.0, 0.5), (1.0, 0.5), (-1.0, 2.0)])
def test_log_snr_has_the_laplace_distribution(mu: float, b: float) -> None:
    """At random t the share of log-SNR below x is the closed-form distribution function of Laplace(mu, b)."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(200_000, dtype=torch.float64, generator=generator).clamp(1e-9, 1 - 1e-9)
    log_snr = -2 * laplace(t, mu=mu, b=b).log()
    for x in mu + b * torch.linspace(-4, 4, 17, dtype=torch.float64):
        tail = 0.5 * math.exp(-abs(float(x) - mu) / b)
        expected = tail if x < mu else 1 - tail
        assert abs(float((log_snr < x).double().mean()) - expected) < 0.005
    assert abs(float(log_snr.mean()) - mu) < 0.02 * b
    assert abs(float(log_snr.var()) / (2 * b**2) - 1) < 0.02


def test_it_is_the_formula_of_the_paper() -> None:
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    lam = 0.7 - 0.4 * torch.sign(0.5 - t) * torch.log(1 - 2 * (t - 0.5).abs())
    torch.testing.assert_close(laplace(t, mu=0.7, b=0.4), torch.exp(-lam / 2))


def test_the_noisy_end_is_at_one_and_the_middle_at_equal_strength() -> None:
    s = laplace(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
    assert s[0] < s[1] < s[2]
    assert float(s[1]) == 1.0
    torch.testing.assert_close(s[0] * s[2], s[1])


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(DiffkitError, match="b must be above 0, not 0"):
        laplace(torch.tensor([0.5]).double(), b=0.0)


def test_the_hook_names_it_without_importing_torch() -> None:
    program = "import sys, diffkit_laplace; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
    assert diffkit_laplace.schedules() == {"laplace": "diffkit_laplace:laplace"}
