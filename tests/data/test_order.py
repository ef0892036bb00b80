"""The order of images: permutations computed position by position."""

import itertools
import math

import numpy as np
import pytest

from repa.base.rng import fold
from repa.data.order import GlobalShuffle, WindowShuffle, permute

SIZES = (3, 4, 5, 0, 1, 7, 2, 4, 6)  # images per shard; one shard has none left


def chi_squared(counts, expected) -> float:
    """Standard score of Pearson's statistic, whose mean is the number of cells - 1 and whose variance is twice that."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8, 9, 31, 64, 65, 1000, 4097])
def test_the_order_is_a_permutation(num):
    for key in range(3):
        assert sorted(permute(np.arange(num), num, key)) == list(range(num))


def test_a_position_does_not_depend_on_the_others_requested():
    whole = permute(np.arange(1000), 1000, 5)
    places = np.array([999, 0, 7, 7, 512])
    np.testing.assert_array_equal(permute(places, 1000, 5), whole[places])
    np.testing.assert_array_equal(permute(np.array([3]), 1000, 5), whole[3:4])


@pytest.mark.parametrize("num", [4, 7])
def test_every_pair_of_images_is_equally_likely_at_any_two_positions(num):
    """Counted over keys, for ordered pairs, and for sets so small that a Feistel network of few rounds would fail."""
    trials = 1500
    orders = [permute(np.arange(num), num, fold(0, key)) for key in range(trials)]
    for first, second in ((0, 1), (num // 2, num - 1)):
        counts = np.zeros((num, num))
        for order in orders:
            counts[order[first], order[second]] += 1
        assert counts.trace() == 0
        pairs = counts[~np.eye(num, dtype=bool)]
        assert abs(chi_squared(pairs, trials / len(pairs))) < 4


def test_a_large_set_is_well_mixed():
    num = 200_000
    order = permute(np.arange(num), num, 11)
    cells = np.bincount(np.arange(num) * 40 // num * 50 + order * 50 // num, minlength=2000)  # (place, image)
    assert abs(chi_squared(cells, num / 2000)) < 4
    uniform = order / num
    for lag in (1, 2, 64, 1024):  # neighbours and positions that differ in one bit are unrelated
        assert abs(np.corrcoef(uniform[:-lag], uniform[lag:])[0, 1]) * math.sqrt(num) < 4
    assert abs(np.corrcoef(np.arange(num), uniform)[0, 1]) * math.sqrt(num) < 4
    other = permute(np.arange(num), num, 12)
    assert (order == other).sum() < 10  # two independent permutations agree at one position on average


def test_the_order_never_changes_between_versions():
    """A resumed run must see the order it started with, so changing the order breaks running trainings."""
    assert GlobalShuffle(1_281_167, seed=0).rows(3, np.array([0, 1, 1_281_166])).tolist() == [9456, 998109, 407031]
    assert WindowShuffle(SIZES, seed=0, window=2).rows(1, np.arange(6)).tolist() == [20, 21, 0, 3, 2, 5]


def test_epochs_and_seeds_have_different_orders():
    rows = [tuple(GlobalShuffle(50, seed).rows(epoch, np.arange(50))) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(rows)) == 4


def test_ten_billion_images_cost_no_more_than_a_few():
    order = GlobalShuffle(10**10, seed=0)
    rows = order.rows(0, np.arange(10**10 - 1000, 10**10))
    assert len(set(rows.tolist())) == 1000
    assert rows.min() >= 0
    assert 9e9 < rows.max() < 10**10


@pytest.mark.parametrize("window", [1, 2, 4, 100])
def test_windows_visit_every_image_once_per_epoch(window):
    order = WindowShuffle(SIZES, seed=3, window=window)
    epochs = [order.rows(epoch, np.arange(sum(SIZES))) for epoch in range(4)]
    for rows in epochs:
        assert sorted(rows) == list(range(sum(SIZES)))
    assert len({tuple(rows) for rows in epochs}) == 4
    np.testing.assert_array_equal(order.rows(2, np.array([31, 4])), epochs[2][[31, 4]])


def test_a_window_holds_whole_shards_and_mixes_them():
    """With windows of 3 of the 9 shards, all images of one window come before those of the next."""
    mixed = 0
    for epoch in range(20):
        order = WindowShuffle(SIZES, seed=1, window=3)
        rows = order.rows(epoch, np.arange(sum(SIZES)))
        shard = np.repeat(np.arange(len(SIZES)), SIZES)[rows]
        place = 0
        for number in range(3):
            wanted = order.shards_from(epoch, place)[:3]
            num = sum(SIZES[s] for s in wanted)
            assert set(shard[place : place + num]) <= set(wanted), number
            place += num
            mixed += len(list(itertools.groupby(shard[place - num : place]))) > len(wanted)
    assert mixed > 40


def test_the_current_and_the_next_window_are_fetched_across_epochs():
    order = WindowShuffle(SIZES, seed=2, window=4)  # windows of 4, 4 and 1 shards
    first, second, last = (order.shards_from(0, 0)[:4], order.shards_from(0, 0)[4:], order.shards_from(0, 31)[0])
    assert sorted([*first, *second, last]) == list(range(9))
    assert SIZES[last], "choose a seed whose last shard has images"
    following = order.shards_from(1, 0)[:4]
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)[order.rows(0, np.arange(32))]
    for place, shard in enumerate(shard_of):
        now, then = ((first, second), (second, [last]), ([last], following))[
            0 if shard in first else 1 if shard in second else 2
        ]
        assert order.shards_from(0, place) == list(dict.fromkeys([*now, *then]))
