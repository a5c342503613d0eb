"""Stored values and [-1, 1]."""

from __future__ import annotations

import torch

from diffkit.engine.codec import decode, encode


def test_black_is_minus_one_and_white_is_one() -> None:
    stored = torch.tensor([[[[0], [255]], [[51], [204]]]], dtype=torch.uint8)
    assert torch.allclose(decode(stored), torch.tensor([[[[-1.0, 1.0], [-0.6, 0.6]]]]), atol=1e-7)


def test_every_level_survives_the_round_trip() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    assert torch.equal(encode(decode(stored)), stored)


def test_channels_move_to_the_front_and_back() -> None:
    stored = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    images = decode(stored)
    assert images.shape == (2, 3, 5, 7)
    assert images.dtype == torch.float32
    assert images[1, 2, 4, 6] == stored[1, 4, 6, 2] / 127.5 - 1
    assert torch.equal(encode(images), stored)


def test_overshoot_is_clamped_not_wrapped() -> None:
    images = torch.tensor([-9.0, -1.001, 1.001, 9.0]).reshape(1, 1, 2, 2)
    assert encode(images).flatten().tolist() == [0, 0, 255, 255]


def test_values_are_rounded_not_cut() -> None:
    images = torch.tensor([0.6, 1.4]).reshape(1, 1, 1, 2) / 127.5 - 1
    assert encode(images).flatten().tolist() == [1, 1]
