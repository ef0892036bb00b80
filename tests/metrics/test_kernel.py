import pytest
import torch

from repa.base.errors import UserError
from repa.metrics import kernel_distance
from tests.oracles import metrics as oracle


def sets(num=12):
    g = torch.Generator().manual_seed(0)
    return torch.randn(num, 4, generator=g), torch.randn(num, 4, generator=g) + 0.7


@pytest.mark.parametrize("degree", [2, 3])
def test_one_subset_of_everything_equals_the_loops(degree):
    x, y = sets()
    got = kernel_distance(x, y, degree=degree, num_subsets=1, subset_size=12)
    assert got == pytest.approx(oracle.kernel_distance(x.tolist(), y.tolist(), degree), rel=1e-10)


def test_the_mean_over_subsets_is_close_to_the_whole():
    x, y = sets(40)
    whole = kernel_distance(x, y, num_subsets=1, subset_size=40)
    assert kernel_distance(x, y, num_subsets=400, subset_size=20) == pytest.approx(whole, rel=0.1)


def test_two_sets_of_one_distribution_are_near_zero():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 4, generator=g), torch.randn(2000, 4, generator=g)
    near = kernel_distance(x, y, num_subsets=10, subset_size=500)
    assert abs(near) < 0.02 < kernel_distance(x, y + 0.3, num_subsets=10, subset_size=500)


def test_the_seed_decides_the_subsets():
    x, y = sets()
    a, b, c = (kernel_distance(x, y, num_subsets=2, subset_size=5, seed=seed) for seed in (0, 0, 1))
    assert a == b != c


def test_invalid_input_is_refused():
    x, y = sets()
    with pytest.raises(UserError, match="subsets of 2 to 12"):
        kernel_distance(x, y)
    with pytest.raises(UserError, match=r"\(12, 4\) and \(12, 3\)"):
        kernel_distance(x, y[:, :3])
    with pytest.raises(UserError, match="finite"):
        kernel_distance(x, y / 0, subset_size=5)
