import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.metrics import Statistics, frechet_distance
from tests.oracles import metrics as oracle


def gaussian(dim, num, seed):
    x = (
        np.random.default_rng(seed).normal(size=(num, dim)) @ np.random.default_rng(seed + 1).normal(size=(dim, dim))
        + seed
    )
    return x.mean(0), np.cov(x, rowvar=False)


def test_the_frechet_distance_equals_the_slow_formula():
    a, b = gaussian(8, 100, 1), gaussian(8, 100, 5)
    assert frechet_distance(*a, *b) == pytest.approx(oracle.frechet(*a, *b), rel=1e-10)
    assert frechet_distance(*b, *a) == pytest.approx(frechet_distance(*a, *b), rel=1e-10)


def test_one_dimension_has_the_closed_form():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    assert frechet_distance([1.0], [[4.0]], [3.5], [[9.0]]) == pytest.approx(2.5**2 + 1)


def test_commuting_covariances_have_the_closed_form():
    s1, s2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([16.0, 1.0, 0.0])
    got = frechet_distance(torch.zeros(3), s1.diag(), torch.ones(3), s2.diag())
    assert got == pytest.approx(3 + ((s1.sqrt() - s2.sqrt()) ** 2).sum().item(), rel=1e-6)


def test_identical_statistics_have_distance_zero():
    mu, sigma = gaussian(8, 100, 1)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_dimensions_give_the_exact_distance():
    """Covariances of rank 4 in 16 dimensions without a common direction have a root with trace exactly zero."""
    a, b = np.zeros((16, 16)), np.zeros((16, 16))
    a[:4, :4], b[8:12, 8:12] = gaussian(4, 9, 1)[1], gaussian(4, 9, 2)[1]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    a, b = rotation @ a @ rotation.T, rotation @ b @ rotation.T
    mu = np.zeros(16)
    assert frechet_distance(mu, a, mu, b) == pytest.approx(np.trace(a) + np.trace(b), rel=1e-6)
    assert frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(mu, a, mu, 4 * a) == pytest.approx(np.trace(a), rel=1e-6)


def test_scaling_all_features_scales_the_distance_by_the_square():
    (m1, s1), (m2, s2) = gaussian(5, 50, 1), gaussian(5, 50, 2)
    assert frechet_distance(3 * m1, 9 * s1, 3 * m2, 9 * s2) == pytest.approx(9 * frechet_distance(m1, s1, m2, s2))


def test_invalid_input_is_refused():
    mu, sigma = gaussian(4, 20, 1)
    with pytest.raises(UserError, match=r"\(4,\), \(4, 4\) and \(3,\)"):
        frechet_distance(mu, sigma, mu[:3], sigma[:3, :3])
    with pytest.raises(UserError, match="finite"):
        frechet_distance(mu, sigma, mu * np.nan, sigma)


def test_it_agrees_with_the_reference_evaluator_to_four_digits():
    """It uses float32 means and the root of an asymmetric product; tested on features as large as an encoder's."""
    g = np.random.default_rng(0)
    mix = g.normal(size=(64, 64)) * np.linspace(1, 0.02, 64)
    x = np.maximum(g.normal(size=(3000, 64)) @ mix, 0).astype(np.float32)
    y = np.maximum(g.normal(size=(2000, 64)) @ mix + 0.1, 0).astype(np.float32)
    ours = [Statistics(), Statistics()]
    for statistics, features in zip(ours, (x, y), strict=True):
        for part in torch.from_numpy(features).split(250):
            statistics.update(part)
    got = frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    assert got == pytest.approx(oracle.adm_frechet(x, y), rel=1e-5)
    exact = [z.astype(np.float64) for z in (x, y)]
    moments = [m for z in exact for m in (z.mean(0), np.cov(z, rowvar=False))]
    assert got == pytest.approx(oracle.frechet(*moments), rel=1e-6)
