"""The distance that real images would have, estimated from the reference's own images."""

import pytest
import torch

from repa.evaluation.measure import distance_of_real
from repa.evaluation.reference import MeanCovariance, Reference
from repa.metrics import Statistics, frechet_distance


def moments(rows):
    statistics = Statistics()
    statistics.update(rows)
    return MeanCovariance.of(statistics)


@pytest.fixture(scope="module")
def reference():
    rows = torch.randn(20_000, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 3, 12)
    return Reference(moments(rows), rows[::2])


@pytest.mark.parametrize("num", [40, 400])
def test_it_predicts_the_distance_of_new_real_images(reference, num):
    stream, scale = torch.Generator().manual_seed(1), torch.linspace(0.5, 3, 12)
    real = reference.statistics
    new = []
    for _ in range(40):
        drawn = moments(torch.randn(num, 12, generator=stream) * scale)
        new.append(frechet_distance(real.mean, real.covariance, drawn.mean, drawn.covariance))
    assert min(new) <= distance_of_real(reference, num) <= max(new)


def test_it_is_absent_without_enough_reference_images(reference):
    assert distance_of_real(reference, 2_000) is not None
    assert distance_of_real(reference, 2_001) is None
    assert distance_of_real(reference._replace(subset=None), 40) is None
    unknown = reference._replace(statistics=reference.statistics._replace(count=None))
    assert distance_of_real(unknown, 40) is None
    assert distance_of_real(reference._replace(subset=reference.subset[:30]), 40) is None
