"""Guidance and the average of the weights."""

import torch
from torch import Tensor, nn

from diffkit.core.ema import Average, ema_decay
from diffkit.core.guidance import guided


def test_guidance_of_one_is_none_and_makes_no_second_call() -> None:
    def never(x: Tensor, s: float) -> Tensor:
        raise AssertionError("the reference was called")

    def denoise(x: Tensor, s: float) -> Tensor:
        return x * 2

    assert guided(denoise, never, 1.0) is denoise


def test_guidance_is_the_published_extrapolation() -> None:
    """Ho and Salimans 2022, eq. 6: (1 + w) conditional - w unconditional, with scale = 1 + w."""
    conditional, unconditional, w = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), 0.7
    denoise = guided(lambda x, s: conditional, lambda x, s: unconditional, 1 + w)
    torch.testing.assert_close(denoise(conditional, 1.0), (1 + w) * conditional - w * unconditional)


def test_the_average_follows_the_weights_early_and_has_the_half_life_later() -> None:
    assert ema_decay(64, 64, 500_000) < 1e-5
    assert ema_decay(10**9, 64, 500_000) == 0.5 ** (64 / 500_000)
    # The warm-up's weights for a constant batch: the average of k steps reaches back about k / 14 steps.
    steps = 10_000
    age, weight = 0.0, 1.0
    for k in range(steps, 0, -1):
        decay = ema_decay(k, 1, 1e12)
        age += weight * (1 - decay) * (steps - k)
        weight *= decay
    assert 0.05 < age / steps < 0.09


def test_the_same_images_give_the_same_average_at_any_batch_size() -> None:
    def after(batch: int) -> float:
        value = 0.0
        for seen in range(batch, 64_001, batch):
            decay = ema_decay(seen, batch, 5_000)
            value = decay * value + (1 - decay) * seen
        return value

    assert abs(after(16) - after(64)) < 100


def test_buffers_are_copied_never_averaged() -> None:
    class Net(nn.Module):
        table: Tensor

        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([value]))
            self.register_buffer("table", torch.tensor([value]))

    average, network = Net(0.0), Net(1.0)
    Average(average, network).update(0.75)
    assert average.weight.item() == 0.25
    assert float(average.table) == 1.0
    assert network.weight.item() == 1.0
