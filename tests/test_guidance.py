"""Guidance, on a model whose denoiser is known, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkit.core.guidance import chosen, guided, rescaled, thresholded


def constant(value: float):  # type: ignore[no-untyped-def]
    return lambda x, s: torch.full_like(x, value)


X = torch.zeros(2, 1, 4, 4)


def test_outside_the_interval_the_reference_is_not_called() -> None:
    calls: list[float] = []

    def reference(x: Tensor, s: float) -> Tensor:
        calls.append(s)
        return torch.zeros_like(x)

    denoise = guided(constant(1.0), reference, 3.0, interval=(0.5, 5.0))
    assert [float(denoise(X, s).mean()) for s in (10.0, 5.0, 1.0, 0.5, 0.1)] == [1.0, 3.0, 3.0, 1.0, 1.0]
    assert calls == [5.0, 1.0]


def test_a_level_for_each_image_is_guided_for_each() -> None:
    denoise = guided(constant(1.0), constant(0.0), 3.0, interval=(0.5, 5.0))
    found = denoise(X, torch.tensor([10.0, 1.0], dtype=torch.float64))
    assert found.mean((1, 2, 3)).tolist() == [1.0, 3.0]


def test_rescaling_takes_the_contrast_back() -> None:
    """Lin et al. 2024, eq. 15 and 16, with standard deviations taken per image."""
    generator = torch.Generator().manual_seed(0)
    plain, pushed = torch.randn(2, 3, 8, 8, generator=generator), 3 * torch.randn(2, 3, 8, 8, generator=generator)
    full = rescaled(pushed, plain, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), plain.std((1, 2, 3)))
    half = rescaled(pushed, plain, 0.5)
    torch.testing.assert_close(half, 0.5 * full + 0.5 * pushed)


def test_rescaling_is_diffusers() -> None:
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    generator = torch.Generator().manual_seed(0)
    plain, pushed = torch.randn(2, 3, 8, 8, generator=generator), 3 * torch.randn(2, 3, 8, 8, generator=generator)
    theirs = pipeline.rescale_noise_cfg(pushed, plain, guidance_rescale=0.7)
    torch.testing.assert_close(rescaled(pushed, plain, 0.7), theirs)


def test_dynamic_thresholding_is_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    clean = 2 * torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    clean[2] /= 20  # within [-1, 1]: left alone
    found = thresholded(lambda x, s: clean, 0.9)(clean, 1.0)
    # The quantile is interpolated there, and the next pixel's value here.
    torch.testing.assert_close(found, scheduler._threshold_sample(clean), atol=0.02, rtol=0)
    assert torch.equal(found[2], clean[2])
    assert float(found.abs().max()) <= 1


def test_they_compose_and_only_what_is_needed_is_called() -> None:
    calls: list[str] = []

    def named(name: str, value: float):  # type: ignore[no-untyped-def]
        def denoise(x: Tensor, s: float) -> Tensor:
            calls.append(name)
            return torch.full_like(x, value)

        return denoise

    label = guided(named("model", 1.0), named("unlabelled", 0.5), 2.0)
    both = thresholded(guided(label, named("guide", 0.0), 2.0, interval=(0.0, 1.0)), 1.0)
    assert float(both(X, 0.5).mean()) == 1.0  # 3, cut off
    assert sorted(calls) == ["guide", "model", "unlabelled"]
    calls.clear()
    both(X, 2.0)
    assert sorted(calls) == ["model", "unlabelled"]


def test_a_choice_by_level_calls_both_only_for_a_mixed_batch() -> None:
    either = chosen(lambda s: s > 1, constant(1.0), constant(2.0))
    assert float(either(X, math.pi).mean()) == 1.0
    assert either(X, torch.tensor([2.0, 0.5], dtype=torch.float64)).mean((1, 2, 3)).tolist() == [1.0, 2.0]
