import pytest
import torch

from repa.base.errors import UserError
from repa.metrics import RunningScore
from tests.oracles import metrics as oracle


def score_of(logits, splits=1):
    score = RunningScore(len(logits) // splits)
    score.update(logits, torch.arange(len(logits)))
    return score.value


@pytest.mark.parametrize("splits", [1, 3])
def test_the_inception_score_equals_the_loops(splits):
    logits = 3 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    expected = oracle.inception_score(logits.double().softmax(1).tolist(), splits)
    assert score_of(logits, splits) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("batch", [1, 5, 23])
def test_the_order_of_the_stream_does_not_change_the_splits(batch):
    """The splits have 10, 10 and 3 images in every order."""
    logits = 3 * torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    parts = logits.double().softmax(1).split(10)
    expected = sum(oracle.inception_score(part.tolist(), 1) for part in parts) / 3
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    score = RunningScore(10)
    for indices in order.split(batch):
        score.update(logits[indices], indices)
    score.reduce()
    assert score.value == pytest.approx(expected, rel=1e-12)


def test_certain_and_varied_predictions_score_the_number_of_classes():
    assert score_of(1e4 * torch.eye(6)) == pytest.approx(6)


def test_equal_predictions_score_one():
    assert score_of(torch.randn(1, 6).repeat(8, 1), 2) == pytest.approx(1)


def test_order_matters_because_each_split_has_its_own_marginal():
    logits = 1e4 * torch.eye(4).repeat_interleave(2, 0)  # classes 0 0 1 1 2 2 3 3
    assert score_of(logits, 2) == pytest.approx(2)
    assert score_of(logits[[0, 2, 4, 6, 1, 3, 5, 7]], 2) == pytest.approx(4)


def test_invalid_input_is_refused():
    score = RunningScore()
    with pytest.raises(UserError, match="at least one image"):
        _ = score.value
    with pytest.raises(UserError, match="NaN or infinite"):
        score.update(torch.full((2, 3), torch.nan), torch.arange(2))
