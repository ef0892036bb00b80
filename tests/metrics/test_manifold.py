import pytest
import torch

from repa.base.errors import UserError
from repa.metrics import manifold, precision_recall
from tests.oracles import metrics as oracle


def sets(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(30, 3, generator=g), 0.5 * torch.randn(25, 3, generator=g) + 0.8


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 1024])
def test_equals_the_loops_whatever_the_blocks(k, block, monkeypatch):
    monkeypatch.setattr(manifold, "BLOCK", block)
    reference, samples = sets()
    got = precision_recall(reference, samples, k)
    r, s = reference.double().numpy(), samples.double().numpy()
    assert got.precision == pytest.approx(oracle.share_within(s, r, k))
    assert got.recall == pytest.approx(oracle.share_within(r, s, k))


def test_precision_is_about_samples_and_recall_about_the_reference():
    """Samples on one of two modes: all of them are real, half of the real ones are reached."""
    mode = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    both = torch.cat([mode, mode + 100])
    assert precision_recall(reference=both, samples=mode + 1e-3) == pytest.approx((1.0, 0.5))
    assert precision_recall(reference=mode, samples=both + 1e-3) == pytest.approx((0.5, 1.0))


def test_far_apart_is_zero():
    reference, samples = sets()
    assert precision_recall(reference, samples + 1000) == (0.0, 0.0)


def test_a_common_offset_does_not_matter():
    reference, samples = sets()
    assert precision_recall(reference + 1000, samples + 1000) == pytest.approx(
        precision_recall(reference, samples), abs=0.05
    )


def test_mistakes():
    reference, samples = sets()
    with pytest.raises(UserError, match="more than k"):
        precision_recall(reference, samples[:3], k=3)
    with pytest.raises(UserError, match=r"\(30, 3\) and \(25, 2\)"):
        precision_recall(reference, samples[:, :2])
