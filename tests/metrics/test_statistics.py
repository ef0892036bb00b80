import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from repa.base import dist
from repa.base.errors import UserError
from repa.metrics import Statistics


def features(num=50, dim=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(num, dim, generator=g) @ torch.randn(dim, dim, generator=g) + torch.arange(float(dim))


def of(x, batch=7):
    statistics = Statistics()
    for part in x.split(batch):
        statistics.update(part)
    return statistics


def assert_are_those_of(statistics, x):
    assert statistics.count == len(x)
    np.testing.assert_allclose(statistics.mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_mean_and_covariance_equal_numpy_for_every_batch_size(batch):
    assert_are_those_of(of(features(), batch), features())


def test_the_covariance_divides_by_n_minus_1():
    assert of(torch.tensor([[0.0], [2.0]])).covariance.item() == 2.0


def test_a_large_mean_does_not_spoil_the_covariance():
    x = features().double()
    np.testing.assert_allclose(of(x + 1e7).covariance.numpy(), np.cov(x.numpy(), rowvar=False), rtol=1e-6, atol=1e-7)


def test_properties_are_not_views_of_the_running_sums():
    statistics = of(features())
    before = statistics.mean
    statistics.update(features(seed=3))
    assert torch.equal(before, of(features()).mean)


def test_half_precision_features_are_summed_in_double():
    x = features().half()
    assert_are_those_of(of(x), x)


def test_invalid_input_is_refused():
    statistics = Statistics()
    with pytest.raises(UserError, match=r"\(N, D\)"):
        statistics.update(features()[0])
    with pytest.raises(UserError, match="mean needs at least 1"):
        _ = statistics.mean
    statistics.update(features(1))
    with pytest.raises(UserError, match="covariance needs at least 2"):
        _ = statistics.covariance
    with pytest.raises(UserError, match=r"\(N, 6\), but got a batch of shape \(3, 5\)"):
        statistics.update(features(3, 5))
    with pytest.raises(UserError, match="NaN"):
        statistics.update(features() / 0)


def reduce_on(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    uneven = of(features()[[slice(0, 13), slice(13, 50)][rank]])
    empty = of(features()[: [50, 0][rank]])  # the second process has no features
    for name, statistics in {"uneven": uneven, "empty": empty}.items():
        statistics.reduce()
        torch.save(vars(statistics), f"{folder}/{name}{rank}.pt")
    dist.teardown()


def test_reduce_gives_every_process_the_whole(tmp_path):
    mp.start_processes(reduce_on, args=(str(tmp_path),), nprocs=2, start_method="fork")  # saves imports
    for name in ("uneven0", "uneven1", "empty0", "empty1"):
        statistics = Statistics()
        vars(statistics).update(torch.load(tmp_path / f"{name}.pt"))
        assert_are_those_of(statistics, features())


def test_reduce_in_one_process_changes_nothing():
    statistics = of(features())
    statistics.reduce()
    assert_are_those_of(statistics, features())
