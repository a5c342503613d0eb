"""Counter-based randomness: the published test vectors, the moments, and independence of how it is asked for."""

import pytest
import torch

from diffkit.core import random
from diffkit.core.random import Purpose, bits, derived_seed, golden, normal, normals, permutation, philox, uniform

# Random123 1.09, kat_vectors: counter, key, result of philox4x32-10.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_vectors(counter: str, key: str, result: str) -> None:
    k0, k1 = words(key)
    found = philox([torch.tensor([word]) for word in words(counter)], (k0, k1))
    assert [int(word) for word in found] == words(result)


def test_bits_use_the_documented_counter() -> None:
    seed, position = 0x299F31D0_A4093822, 0x3_00000005
    found = bits(seed, Purpose.FLIP, torch.tensor([position]), 8, interval=9)
    counter = [torch.tensor([1]), torch.tensor([Purpose.FLIP | 9 << 8]), torch.tensor([5]), torch.tensor([3])]
    expected = philox(counter, (0xA4093822, 0x299F31D0))
    assert found[0, 4:].tolist() == [int(word) for word in expected]


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    x = normal(1, Purpose.TRAIN_NOISE, torch.arange(1000), (1000,)).double().flatten()
    n = len(x)
    assert abs(x.mean()) < 4 / n**0.5
    assert abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # Kolmogorov-Smirnov against the normal distribution function, at the 0.1 % level.
    ordered = torch.special.ndtr(x.sort().values)
    assert (ordered - torch.arange(n) / n).abs().max() < 1.95 / n**0.5


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    whole = normal(3, Purpose.START_NOISE, torch.arange(64), (3, 5, 5))
    pieces = [normal(3, Purpose.START_NOISE, part, (3, 5, 5)) for part in torch.arange(64).split(7)]
    assert torch.equal(whole, torch.cat(pieces))


def test_purposes_seeds_positions_and_intervals_are_independent() -> None:
    position = torch.arange(200)
    streams = [
        normal(0, Purpose.TRAIN_NOISE, position, (100,)),
        normal(1, Purpose.TRAIN_NOISE, position, (100,)),
        normal(0, Purpose.START_NOISE, position, (100,)),
        normal(0, Purpose.STEP_NOISE, position, (100,), interval=1),
        normal(0, Purpose.STEP_NOISE, position, (100,), interval=2),
        normal(0, Purpose.TRAIN_NOISE, position + 2**32, (100,)),
    ]
    correlation = torch.corrcoef(torch.stack([stream.flatten() for stream in streams]))
    assert (correlation - torch.eye(len(streams))).abs().max() < 4 / 20_000**0.5


def test_uniform_numbers_lie_strictly_inside_the_unit_interval() -> None:
    u = uniform(0, Purpose.FLIP, torch.arange(100_000))
    assert u.dtype == torch.float64
    assert 0 < u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1


def test_golden_levels_are_as_even_as_strata_at_any_place() -> None:
    for first in (0, 12_345, 10**9):
        t = golden(7, Purpose.TRAIN_LEVEL, torch.arange(first, first + 256)).sort().values
        gaps = torch.diff(t)
        assert gaps.max() < 2.7 / 256  # the three-distance theorem: at most phi^2 times 1/n
        assert t.min() > 0 and t.max() < 1


def test_every_epoch_visits_every_image_once_in_its_own_order() -> None:
    orders = [permutation(5, epoch, 1001) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1001))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], permutation(5, 1, 1001))
    # About one image in 1001 stays where it is: Poisson with mean 1.
    assert (orders[0] == torch.arange(1001)).sum() < 8


def test_derived_seeds_differ_by_step_and_micro_batch() -> None:
    seeds = {derived_seed(0, Purpose.NETWORK, step, micro) for step in range(50) for micro in range(4)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("at_once", [1, 270, 2**18])
def test_several_intervals_at_once_are_those_one_by_one(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.tensor([0, 5, 2**33])
    intervals = [7, 0, 2**20, 3]
    monkeypatch.setattr(random, "_AT_ONCE", at_once)
    together = normals(3, Purpose.BROWNIAN, positions, (2, 3, 5), intervals)
    for interval, found in zip(intervals, together, strict=True):
        assert torch.equal(found, normal(3, Purpose.BROWNIAN, positions, (2, 3, 5), interval))
