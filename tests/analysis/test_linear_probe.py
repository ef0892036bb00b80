import pytest
import torch

from repa.analysis import linear_probes
from repa.analysis.probes import suitable_batch
from repa.base.errors import UserError

SETTINGS = {"epochs": 15, "batch_size": 64, "lr": 0.02}


def linear_probe(*sets, lr=1e-3, **settings):
    """Top-1 accuracy of one head."""
    return linear_probes(*sets, learning_rates=(lr,), **settings)[0].top1


def problem(num=400, dim=6, classes=4, spread=0.3, seed=0):
    """Well-separated classes in features of very different scales, which batch normalisation must equalise."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (num,), generator=g)
    features = centres[labels] + spread * torch.randn(num, dim, generator=g)
    return features * torch.logspace(-4, 3, dim) + 50, labels


def test_separable_classes_are_learned():
    assert linear_probe(*problem(), *problem(seed=1), **SETTINGS) > 0.95


def test_shuffled_labels_are_at_chance():
    features, labels = problem()
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(5))]
    assert linear_probe(features, shuffled, *problem(2000, seed=1), **SETTINGS) == pytest.approx(0.25, abs=0.15)


def test_test_features_are_normalised_by_the_training_statistics():
    """Testing images one at a time must give the same answers as all together."""
    train, (features, labels) = problem(), problem(20, spread=1.0, seed=1)
    together = linear_probe(*train, features, labels, **SETTINGS)
    alone = [linear_probe(*train, features[i : i + 1], labels[i : i + 1], **SETTINGS) for i in range(20)]
    assert 0.5 < together < 1
    assert sum(alone) / 20 == pytest.approx(together)


def test_a_last_batch_of_one_image_and_a_batch_larger_than_the_data_work():
    features, labels = problem(65)
    assert linear_probe(features, labels, features, labels, epochs=60, batch_size=64, lr=0.05) > 0.95
    assert linear_probe(features, labels, features, labels, epochs=60, lr=0.05) > 0.95


def test_one_seed_gives_one_accuracy_and_the_callers_random_state_is_kept():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = (linear_probe(*problem(spread=1.5), *problem(spread=1.5, seed=1), **SETTINGS) for _ in range(2))
    assert a == b
    assert torch.equal(before, torch.get_rng_state())


def test_heads_trained_together_equal_heads_trained_alone():
    sets = (*problem(spread=1.5), *problem(spread=1.5, seed=1))
    rates = (1e-3, 0.02, 0.3)
    together = linear_probes(*sets, learning_rates=rates, epochs=8, batch_size=64)
    alone = [linear_probe(*sets, epochs=8, batch_size=64, lr=rate) for rate in rates]
    assert [head.top1 for head in together] == pytest.approx(alone)
    assert len(set(alone)) == 3


def test_top5_counts_the_five_highest_scores():
    """Pairs of classes share features, so the first guess is right for half of the images, the first five for all."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(16).repeat(40)
    features = torch.eye(8)[labels // 2] + 0.01 * torch.randn(640, 8, generator=g)
    (head,) = linear_probes(features, labels, features, labels, learning_rates=(0.05,), epochs=20, batch_size=160)
    assert head.top1 == pytest.approx(0.5, abs=0.1)
    assert head.top5 == 1
    # features without information
    (wide,) = linear_probes(torch.zeros(640, 1), labels, torch.zeros(640, 1), labels, epochs=1)
    assert wide.top5 == pytest.approx(5 / 16)
    (few,) = linear_probes(features, labels % 5, features, labels % 5, epochs=1)
    assert few.top5 is None


def test_half_precision_features_are_accepted():
    features, labels = problem(100)
    half = ((features - features.mean(0)) / features.std(0)).half()
    assert linear_probe(half, labels, half, labels, epochs=5) == linear_probe(
        half.float(), labels, half.float(), labels, epochs=5
    )


def test_the_batch_keeps_the_papers_number_of_steps():
    assert suitable_batch(1_281_167) == 16_384
    assert suitable_batch(10_000_000) == 16_384
    assert suitable_batch(100_000) == 100_000 // 78
    assert suitable_batch(1_600) == 256


def test_invalid_input_is_refused():
    features, labels = problem(10)
    with pytest.raises(UserError, match=r"test features .* got \(10, 6\) and \(9,\)"):
        linear_probe(features, labels, features, labels[:9])
    with pytest.raises(UserError, match="6 and 5 channels"):
        linear_probe(features, labels, features[:, :5], labels)
    with pytest.raises(UserError, match="label is -1"):
        linear_probe(features, labels - 1 - labels.min(), features, labels)
    with pytest.raises(UserError, match="at least 2 training images"):
        linear_probe(features[:1], labels[:1], features, labels)
    with pytest.raises(UserError, match="test features contain NaN"):
        linear_probe(features, labels, features / 0, labels)
