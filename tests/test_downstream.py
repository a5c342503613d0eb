"""The downstream check: a known answer on toy images, intervals, and what is refused."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
import torch

from diffkit.errors import DiffkitError
from diffkit.measure.downstream import Classifier, Downstream, Labelled, _mean, downstream

CPU = torch.device("cpu")


def bars(count: int, seed: int, *, noise: float = 40.0, shuffled: bool = False) -> Labelled:
    """Class k has a bright bar in the k-th third of the height, under noise."""
    generator = np.random.default_rng(seed)
    classes = generator.integers(0, 3, count)
    images = generator.normal(90, noise, (count, 12, 12, 1))
    for image, number in zip(images, classes, strict=True):
        image[1 + 4 * number : 3 + 4 * number] += 60
    labels = generator.integers(0, 3, count) if shuffled else classes
    return Labelled(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def finished(work: Generator[Any, None, Downstream]) -> Downstream:
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Downstream = end.value
            return result


def test_more_images_of_the_same_kind_help_and_wrong_labels_do_not() -> None:
    real, held_out = bars(12, 0, noise=90), bars(300, 1, noise=90)
    good = finished(downstream(real, bars(400, 2, noise=90), held_out, 3, CPU, steps=80))
    accuracy = {each.name: each for each in good.accuracy}
    gain = {each.name: each for each in good.gain}
    assert list(accuracy) == ["real", "real + samples", "samples"]
    assert gain["samples"].low > 0  # type: ignore[operator]
    assert accuracy["samples"].value > accuracy["real"].value
    assert gain["samples"].value == pytest.approx(accuracy["samples"].value - accuracy["real"].value)
    useless = finished(downstream(bars(300, 3), bars(400, 4, shuffled=True), held_out, 3, CPU, steps=40))
    chance = {each.name: each for each in useless.accuracy}["samples"]
    assert 0.2 < chance.value < 0.47
    assert {each.name: each for each in useless.gain}["samples"].high < 0  # type: ignore[operator]


def test_the_interval_covers_images_and_seeds() -> None:
    """Correctness = a seed's skill plus an image's difficulty; the truth is the mean over all of both."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(300):
        skill = 0.02 * torch.randn(3, 1, generator=generator, dtype=torch.float64)
        chance = (0.7 + skill + 0.2 * torch.randn(1, 200, generator=generator, dtype=torch.float64)).clamp(0, 1)
        correct = (torch.rand(3, 200, generator=generator, dtype=torch.float64) < chance).double()
        found = _mean("x", correct)
        covered += found.low <= 0.695 <= found.high  # type: ignore[operator]
    assert 0.9 < covered / 300 < 0.99


@pytest.mark.parametrize("shape", [(8, 8), (12, 40), (64, 48)])
def test_the_classifier_takes_any_size(shape: tuple[int, int]) -> None:
    assert Classifier(3, 4, min(shape))(torch.zeros(2, 3, *shape)).shape == (2, 4)


def test_too_few_classes_or_images_are_refused() -> None:
    with pytest.raises(DiffkitError, match="two classes"):
        finished(downstream(bars(30, 0), bars(30, 1), bars(30, 2), 1, CPU))
    with pytest.raises(DiffkitError, match="19 labelled held-out images are too few"):
        finished(downstream(bars(30, 0), bars(30, 1), bars(19, 2), 3, CPU))
