import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.metrics import manifold, precision_recall, precision_recall_in_half
from tests.oracles import metrics as oracle


def sets(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(30, 3, generator=g), 0.5 * torch.randn(25, 3, generator=g) + 0.8


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 1024])
def test_every_block_size_gives_the_loops_result(k, block, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", block)
    reference, samples = sets()
    got = precision_recall(reference, samples, k)
    r, s = reference.double().numpy(), samples.double().numpy()
    assert got.precision == pytest.approx(oracle.share_within(s, r, k))
    assert got.recall == pytest.approx(oracle.share_within(r, s, k))


def test_precision_is_about_samples_and_recall_about_the_reference():
    """With samples on one of two modes, all samples are realistic but only half of the real ones are covered."""
    mode = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    both = torch.cat([mode, mode + 100])
    assert precision_recall(reference=both, samples=mode + 1e-3) == pytest.approx((1.0, 0.5))
    assert precision_recall(reference=mode, samples=both + 1e-3) == pytest.approx((0.5, 1.0))


def test_distant_sets_have_precision_and_recall_zero():
    reference, samples = sets()
    assert precision_recall(reference, samples + 1000) == (0.0, 0.0)


def test_a_common_offset_does_not_matter():
    reference, samples = sets()
    assert precision_recall(reference + 1000, samples + 1000) == pytest.approx(
        precision_recall(reference, samples), abs=0.05
    )


def test_invalid_input_is_refused():
    reference, samples = sets()
    with pytest.raises(UserError, match="more than k"):
        precision_recall(reference, samples[:3], k=3)
    with pytest.raises(UserError, match=r"\(30, 3\) and \(25, 2\)"):
        precision_recall(reference, samples[:, :2])


def test_a_set_against_itself_is_one_despite_duplicates():
    """With four copies of each, the third neighbour has distance 0, which must not exceed the radius by rounding."""
    x = torch.randn(25, 1000, generator=torch.Generator().manual_seed(0)).repeat(4, 1) + 3
    assert precision_recall(x, x.flip(0)) == (1.0, 1.0)
    for num in range(4, 25):  # products of other shapes round differently
        assert precision_recall(x, x[:num]).precision == 1.0


def test_an_image_is_not_its_own_neighbour():
    """With pairs of equal features, k = 1 reaches the duplicate and k = 2 the next pair."""
    x = torch.tensor([[0.0], [0.0], [10.0], [10.0]])
    assert precision_recall(x, torch.tensor([[1.0], [2.0], [100.0]]), k=1).precision == 0
    assert precision_recall(x, torch.tensor([[1.0], [-9.0], [100.0]]), k=2).precision == pytest.approx(2 / 3)


def test_arguments_cannot_be_swapped_unnoticed():
    reference, samples = sets()
    got = precision_recall(reference, samples)
    assert precision_recall(samples, reference) == (got.recall, got.precision)
    assert got.precision > got.recall + 0.2


def test_sums_ignore_the_trainers_matmul_precision():
    torch.set_float32_matmul_precision("high")
    try:
        precision_recall(*sets())
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_features_are_refused(bad):
    reference, samples = sets()
    samples[3, 1] = bad
    for pair in ((reference, samples), (samples, reference)):
        with pytest.raises(UserError, match="features must be finite"):
            precision_recall(*pair)


class TestHalf:
    @pytest.mark.parametrize("block", [7, 10_000])
    def test_float16_rounding_follows_the_reference_evaluator(self, block, monkeypatch):
        """The features are so close that rounding matters and float32 gives other results."""
        monkeypatch.setattr(manifold, "ADM_BLOCK", block)
        g = torch.Generator().manual_seed(0)
        reference = 4 + 0.05 * torch.randn(40, 32, generator=g)
        samples = 4 + 0.06 * torch.randn(33, 32, generator=g)
        distances = manifold._distances_in_half(reference, samples).numpy()
        assert np.array_equal(distances, oracle.half_distances(reference.numpy(), samples.numpy()))
        got = precision_recall_in_half(reference, samples)
        assert got == pytest.approx(oracle.adm_precision_recall(reference.numpy(), samples.numpy(), 3))
        assert got != precision_recall(reference, samples)

    def test_overflowing_features_fall_back_to_float32(self):
        reference, samples = (300 * x for x in sets())  # squared norms above 65,504
        assert manifold._to_half(reference.square().sum(1)).isinf().any()
        assert precision_recall_in_half(reference, samples) == pytest.approx(precision_recall(reference, samples))

    def test_invalid_input_is_refused(self):
        reference, samples = sets()
        with pytest.raises(UserError, match="more than k"):
            precision_recall_in_half(reference, samples[:3], k=3)
