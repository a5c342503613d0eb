"""Image-to-image tasks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffkit.core import tasks
from diffkit.core.denoiser import Denoiser, squared_error
from diffkit.core.predictions import edm
from diffkit.testing import check_task

ALL = {
    "super-resolution": (tasks.super_resolution, {}),
    "super-resolution:factor=2": (tasks.super_resolution, {"factor": 2}),
    "inpaint": (tasks.inpaint, {}),
    "colorize": (tasks.colorize, {}),
    "translate": (tasks.translate, {}),
}


def draw(count: int, rows: int = 1) -> Tensor:
    return torch.rand(rows, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
def test_every_task_keeps_the_contract(name: str) -> None:
    function, options = ALL[name]
    check_task(function, **options)


def test_a_low_resolution_image_enlarged_by_repeating_is_seen_as_itself() -> None:
    """What `sample --input` relies on; and the enlargement is Pillow's bicubic, away from the edges."""
    small = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    repeated = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    shown = tasks.super_resolution(repeated, draw, None, factor=4)
    again = torch.nn.functional.avg_pool2d(repeated, 4)
    torch.testing.assert_close(again, small)
    for channel in range(3):
        image = Image.fromarray(small[0, channel].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        theirs = np.clip(np.asarray(image), -1, 1)
        # Pillow's cubic has a = -0.5, torch's -0.75: alike, not equal.
        assert np.abs(theirs - shown[0, channel].numpy())[8:-8, 8:-8].mean() < 0.06


def test_the_holes_of_training_vary_and_hide_the_image() -> None:
    images = torch.full((500, 1, 16, 16), 0.7)
    shown = tasks.inpaint(images, partial(draw, rows=500), None)
    seen, mask = shown[:, :1], shown[:, 1:]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(seen, torch.where(mask > 0, 0.0, images))
    share = mask.mean((1, 2, 3))
    assert float(share.min()) > 0 and float(share.max()) > 0.6 and 0.2 < float(share.mean()) < 0.6
    assert len(torch.unique(mask.flatten(1), dim=0)) > 480


def test_a_near_denoiser_is_a_plain_one_of_the_difference() -> None:
    """Sampled, too, it would give the difference plus what is near: the noise is the same."""

    class Network(nn.Module):
        def forward(self, x: Tensor, c_noise: Tensor, image: Tensor | None = None) -> Tensor:
            return torch.tanh(x) * c_noise[:, None, None, None]

    generator = torch.Generator().manual_seed(0)
    clean, noise, shown = (torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3))
    gray, s = shown[:, :1], torch.tensor([0.01, 0.3, 2.0, 50.0], dtype=torch.float64)
    prediction = partial(edm, sigma_data=0.2)
    plain, near = Denoiser(Network(), prediction), Denoiser(Network(), prediction, near=True)
    for image in (shown, gray, torch.cat([shown, gray], 1)):
        base = image[:, :3] if image.shape[1] > 1 else image
        expected = base + plain(clean - base, s)
        torch.testing.assert_close(near(clean, s, {"image": image}), expected)
        torch.testing.assert_close(
            squared_error(near, clean, s, noise, {"image": image}), squared_error(plain, clean - base, s, noise)
        )


def test_gray_is_pillows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    gray = tasks.colorize(images, draw, None)
    theirs = np.asarray(Image.fromarray(pixels).convert("L")) / 127.5 - 1
    assert np.abs(gray[0, 0].numpy() - theirs).max() < 1.1 / 127.5
