"""Distances and their intervals: against independent implementations, closed forms and repeated draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffkit.errors import DiffkitError
from diffkit.measure import kernel
from diffkit.measure.copying import Pixels, View, copying, mirrored, neighbours
from diffkit.measure.estimate import share, student95
from diffkit.measure.frechet import enough, frechet, frechet_interval
from diffkit.measure.kernel import kernel_distance
from diffkit.measure.manifold import fidelity, nearest
from diffkit.measure.scores import Names, floor, scores

DRAWS = 400


@dataclass(frozen=True)
class Gaussian:
    mean: Tensor
    covariance: Tensor

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        root = torch.linalg.cholesky(self.covariance)
        noise = torch.randn(count, len(self.mean), generator=generator, dtype=torch.float64)
        return (self.mean + noise @ root.T).float()


def gaussians(dimensions: int, shift: float, stretch: float, seed: int = 1) -> tuple[Gaussian, Gaussian]:
    """Two correlated Gaussians some way apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing, other = normal(dimensions, dimensions), normal(dimensions, dimensions)
    covariance = 0.5 * mixing @ mixing.T / dimensions + 0.5 * torch.eye(dimensions, dtype=torch.float64)
    mean = 0.5 * normal(dimensions)
    wider = stretch * covariance + (stretch - 1) * other @ other.T / dimensions
    return Gaussian(mean, covariance), Gaussian(mean + shift * normal(dimensions) / math.sqrt(dimensions), wider)


def true_frechet(a: Gaussian, b: Gaussian) -> float:
    """The Wasserstein distance of two Gaussians; the root from the eigenvalues of the product."""
    roots = np.linalg.eigvals((a.covariance @ b.covariance).numpy()).real.clip(min=0) ** 0.5
    shift = float((a.mean - b.mean).square().sum())
    return shift + float(a.covariance.trace() + b.covariance.trace()) - 2 * float(roots.sum())


def mean_kernel(a: Gaussian, b: Gaussian) -> float:
    """E (x.y / D + 1)^3 from the moments of x.y for independent Gaussian x and y."""
    d = len(a.mean)
    along = float(a.mean @ b.mean)
    spread = float(a.mean @ b.covariance @ a.mean)
    rest = float((a.covariance * b.covariance).sum() + b.mean @ a.covariance @ b.mean)
    both = float(a.mean @ b.covariance @ a.covariance @ b.mean)
    second = along**2 + spread + rest
    third = along**3 + 3 * along * spread + 3 * (along * rest + 2 * both)
    return third / d**3 + 3 * second / d**2 + 3 * along / d + 1


def true_kernel(a: Gaussian, b: Gaussian) -> float:
    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    """Features of 300 and 240 images in 24 dimensions, positive as a network's are."""
    a, b = gaussians(24, 0.5, 1.2)
    generator = torch.Generator().manual_seed(3)
    return a.draw(300, generator).abs(), b.draw(240, generator).abs()


def test_the_frechet_distance_is_torch_fidelitys(pair: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = pair
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    assert frechet(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


@pytest.mark.parametrize("count", [20, 25, 300])
def test_the_frechet_distance_is_torchmetrics_however_few_the_images(pair: tuple[Tensor, Tensor], count: int) -> None:
    from torchmetrics.image.fid import _compute_fid

    x, y = (features[:count].double() for features in pair)
    theirs = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet(x.float(), y.float()) == pytest.approx(float(theirs), rel=1e-4)


def test_the_kernel_distance_is_torch_fidelitys(pair: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_kid import kid_features_to_metric

    x, y = (features[:200] for features in pair)
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=200, verbose=False)
    assert kernel_distance("KID", x, y).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


@pytest.mark.parametrize("tile", [1024, 64])
def test_the_kernel_distance_is_torchmetrics(
    pair: tuple[Tensor, Tensor], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics.image.kid import poly_mmd

    monkeypatch.setattr(kernel, "TILE", tile)
    x, y = (features[:200] for features in pair)
    assert kernel_distance("KID", x, y).value == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-4)


def test_the_kernel_among_real_images_is_computed_once(
    pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = pair[0].clone(), pair[1]
    computed: list[int] = []
    plain = kernel._kernel
    monkeypatch.setattr(kernel, "_kernel", lambda a, b: (computed.append(len(a) * len(b)), plain(a, b))[1])
    first = kernel_distance("KID", x, y)
    assert computed.count(300 * 300) == 1
    assert kernel_distance("KID", x, y.clone()) == first and computed.count(300 * 300) == 1


def test_precision_recall_density_and_coverage_are_prdcs(pair: tuple[Tensor, Tensor]) -> None:
    from prdc import compute_prdc

    x, y = pair
    theirs = compute_prdc(x.numpy().astype(np.float64), y.numpy().astype(np.float64), nearest_k=5)
    ours = {each.name: each.value for each in fidelity(x, y)}
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert 0.1 < ours["precision"] < 1
    assert 0.1 < ours["recall"] < 1


def test_precision_and_recall_are_torch_fidelitys(pair: tuple[Tensor, Tensor]) -> None:
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = pair
    theirs = prc_features_to_metric(y, x, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    ours = {each.name: each.value for each in fidelity(x, y, neighbours=3)}
    assert ours["precision"] == pytest.approx(theirs["precision"], rel=1e-4)
    assert ours["recall"] == pytest.approx(theirs["recall"], rel=1e-4)


@pytest.mark.parametrize(
    ("dimensions", "n", "m", "shift", "stretch"), [(8, 80, 80, 1.0, 1.3), (16, 200, 120, 0.5, 1.2)]
)
def test_the_corrected_frechet_distance_is_unbiased_and_its_interval_covers_the_truth(
    dimensions: int, n: int, m: int, shift: float, stretch: float
) -> None:
    a, b = gaussians(dimensions, shift, stretch)
    truth, generator = true_frechet(a, b), torch.Generator().manual_seed(5)
    found = []
    for _ in range(DRAWS):
        *_, estimate = frechet_interval("FD", a.draw(n, generator), b.draw(m, generator))
        assert estimate is not None
        found.append(estimate)
    covered = sum(each.low <= truth <= each.high for each in found) / DRAWS  # type: ignore[operator]
    assert 0.92 <= covered <= 0.98
    values = np.array([each.value for each in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(DRAWS) + 0.01 * truth


@pytest.mark.parametrize(
    ("dimensions", "n", "m", "shift", "stretch"),
    [(32, 160, 160, 0.5, 1.2), (64, 300, 200, 0.3, 1.0), (64, 200, 200, 0, 1)],
)
def test_the_kernel_distance_is_unbiased_and_its_interval_covers_the_truth(
    dimensions: int, n: int, m: int, shift: float, stretch: float
) -> None:
    a, b = gaussians(dimensions, shift, stretch)
    truth, generator = true_kernel(a, b), torch.Generator().manual_seed(6)
    found = [kernel_distance("KID", a.draw(n, generator), b.draw(m, generator)) for _ in range(DRAWS)]
    covered = sum(each.low <= truth <= each.high for each in found) / DRAWS  # type: ignore[operator]
    assert 0.92 <= covered <= 0.98
    values = np.array([each.value for each in found])
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(DRAWS)


def test_the_quantile_of_students_t_is_scipys() -> None:
    from scipy.stats import t

    for degrees in (1, 2, 2.5, 9, 19, 1000):
        assert student95(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=2e-3)


def test_the_interval_of_a_share_is_wilsons() -> None:
    from scipy.stats import binomtest

    for hits, count in ((0, 20), (3, 20), (20, 20), (250, 1000)):
        theirs = binomtest(hits, count).proportion_ci(method="wilson")
        ours = share("share", hits, count)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_nearest_neighbours_are_scikit_learns(pair: tuple[Tensor, Tensor]) -> None:
    from sklearn.neighbors import NearestNeighbors

    x, y = pair
    theirs = NearestNeighbors(n_neighbors=4).fit(x.numpy())
    for queries, skip_self, first in ((y, False, 0), (x, True, 1)):
        distances, indices = theirs.kneighbors(queries.numpy())
        ours = nearest(queries, x, 3, skip_self=skip_self)
        assert np.array_equal(ours[1].numpy(), indices[:, first : first + 3])
        assert np.allclose(ours[0].numpy(), distances[:, first : first + 3], rtol=1e-4)


def test_copies_are_found_and_unseen_images_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = gaussians(32, 0, 1)[0].draw
    train, held_out, fresh = (draw(count, generator) for count in (400, 200, 300))
    among_train, unseen = neighbours(train, train, skip_self=True), neighbours(held_out, train)
    copies = train[:300] + 0.05 * torch.randn(300, 32, generator=generator)
    verdict = copying([View(neighbours(copies, train), among_train, unseen)])
    assert verdict.rate.value == 1
    assert verdict.alarm
    assert verdict.baseline is not None
    assert verdict.baseline.value <= 0.02
    honest = copying([View(neighbours(fresh, train), among_train, unseen)])
    assert honest.rate.value <= 0.02
    assert not honest.alarm


def test_one_view_that_sees_a_copy_is_enough_and_mirrored_copies_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (120, 3, 24, 20), generator=generator, dtype=torch.uint8)
    train, held_out = Pixels()(images[:60]), Pixels()(images[60:])
    versions = train, mirrored(train)
    assert torch.allclose(mirrored(train), Pixels()(images[:60].flip(-1)), atol=1e-6)
    among_train, unseen = neighbours(train, *versions, skip_self=True), neighbours(held_out, *versions)
    flipped = neighbours(Pixels()(images[:30].flip(-1)), *versions)
    assert flipped.indices[:, 0].tolist() == list(range(30))
    assert all(len(set(row)) == 50 for row in flipped.indices.tolist())
    assert (flipped.distances.diff(dim=1) >= 0).all()
    blind = neighbours(held_out[:30], *versions)
    verdict = copying([View(blind, among_train, unseen), View(flipped, among_train, unseen)])
    assert verdict.rate.value == 1
    assert verdict.views.tolist() == [1] * 30
    assert copying([View(blind, among_train, unseen)]).rate.value < 0.1


def test_few_images_get_a_raw_distance_that_says_so_and_many_a_corrected_one() -> None:
    a, b = gaussians(8, 1.0, 1.3)
    generator = torch.Generator().manual_seed(2)
    few = [each for each in scores(a.draw(30, generator), b.draw(50, generator), Names("FD-x", "KD-x")) if each]
    assert [each.name for each in few] == ["FD-x", "KD-x", "precision", "recall", "density", "coverage"]
    assert few[0].note == "at 30 of each, biased"
    assert few[0].low is None
    many = [each for each in scores(a.draw(400, generator), b.draw(400, generator), Names("FD-x", "KD-x")) if each]
    raw, corrected = many[0], many[1]
    assert corrected.name == "FD-x corrected"
    assert corrected.low < true_frechet(a, b) < corrected.high  # type: ignore[operator]
    assert corrected.value < raw.value


def test_the_floor_is_what_real_images_get_among_themselves() -> None:
    real = gaussians(8, 0, 1)[0].draw(400, torch.Generator().manual_seed(4))
    found = {each.name: each for each in floor(real, 1000, Names("FD-x", "KD-x"))}
    assert found["FD-x"].note == "at 200 of each"
    assert found["FD-x"].value < 0.5
    assert found["KD-x"].low < 0 < found["KD-x"].high  # type: ignore[operator]
    assert floor(real[:30], 1000, Names("FD-x", "KD-x")) == []


def test_too_few_images_are_refused() -> None:
    real = torch.zeros(100, 4)
    with pytest.raises(DiffkitError, match="19 made images are too few"):
        list(scores(real, real[:19], Names("FD", "KD")))


def test_five_images_a_dimension_are_enough() -> None:
    assert enough(torch.zeros(40, 8), torch.zeros(40, 8))
    assert not enough(torch.zeros(39, 8), torch.zeros(400, 8))
