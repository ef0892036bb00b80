"""Copies of training images are found, and nothing else is."""

import numpy as np
import pytest
import torch

from repa.analysis import find_copies, nearest_images
from repa.analysis import neighbours as module
from repa.analysis.config import NeighboursConfig
from repa.analysis.neighbours import compare
from repa.base.errors import UserError
from tests.analysis.stand_ins import Rearranged


def rows(num, seed, dim=6):
    return torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [4, 1024])
def test_nearest_equals_a_loop_over_sorted_distances(block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    queries, images = rows(10, 0), rows(30, 1)
    near = nearest_images(queries, images, 3)
    for q, distances, indices in zip(queries, *near, strict=True):
        u = q.double() / q.double().norm()
        every = [((u - v.double() / v.double().norm()).norm().item(), i) for i, v in enumerate(images)]
        expected = sorted(every)[:3]
        assert indices.tolist() == [i for _, i in expected]
        assert distances.tolist() == pytest.approx([d for d, _ in expected], abs=1e-6)


def test_a_copy_is_at_distance_zero_and_an_image_is_not_its_own_neighbour():
    images = rows(30, 1)
    near = nearest_images(images[[7, 3]] * 5, images)
    assert near.indices[:, 0].tolist() == [7, 3]
    assert near.distances.max() < 1e-6
    own = torch.arange(30)
    others = nearest_images(images, images, own=own)
    assert (others.indices[:, 0] != own).all()
    assert others.distances.min() > 1e-3


def test_the_verdict_tells_copies_from_samples_like_held_out_images():
    g = torch.Generator().manual_seed(0)
    held_out = torch.rand(2000, generator=g).double()
    honest = compare(torch.rand(2000, generator=g).double(), held_out)
    assert honest.share_near == pytest.approx(0.01, abs=0.008)
    assert honest.threshold == pytest.approx(0.01, abs=0.005)
    copied = compare(torch.cat([torch.zeros(50), torch.rand(50, generator=g)]).double(), held_out)
    assert copied.share_near == pytest.approx(0.5, abs=0.05)
    assert copied.median < honest.median == pytest.approx(honest.median_held_out, abs=0.05)


def test_copies_among_samples_are_reported_with_their_row_in_the_data(data):
    images = torch.from_numpy(data.gather("images", np.arange(40)))
    noise = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([images[[11, 25]], noise])
    seen = []
    config = NeighboursConfig(batch_size=16, neighbours=2)
    found = find_copies(samples.split(2), 5, data, config, progress=lambda *n: seen.append(n))
    table = found.rows()
    assert [row["nearest"] for row in table[:2]] == [11, 25]
    assert all(row["distance"] < 1e-5 and row["nearer_than"] > 0.9 for row in table[:2])
    assert all(row["distance"] > 0.1 and row["nearer_than"] < 0.5 for row in table[2:])
    assert found.verdict.share_near == pytest.approx(2 / 5)
    assert seen[-1] == (45, 45)
    half = find_copies(samples.split(2), 5, data, config.override(num_images=20))  # every second row or so
    assert set(half.near.indices.flatten().tolist()) <= set(np.linspace(0, 39, 20).round().astype(int).tolist())


def test_held_out_images_replace_the_training_images(data):
    dark, light = Rearranged(data, rows=np.arange(20)), Rearranged(data, rows=np.arange(20, 40))
    samples = [torch.from_numpy(data.gather("images", np.arange(20)))]
    far = find_copies(samples, 20, dark, NeighboursConfig(), held_out=light).verdict
    same = find_copies(samples, 20, dark, NeighboursConfig(), held_out=dark).verdict
    assert far.share_near == 1  # samples are training images; held-out images are of the other class
    assert far.median_held_out > 0.1
    assert same.median_held_out == pytest.approx(0, abs=1e-5)


def test_invalid_input_is_refused(data):
    with pytest.raises(UserError, match=r"\(3, 6\) and \(30, 5\)"):
        nearest_images(rows(3, 0), rows(30, 1, dim=5))
    with pytest.raises(UserError, match="31 neighbours need at least 31 images, but got 30"):
        nearest_images(rows(3, 0), rows(30, 1), 31)
    with pytest.raises(UserError, match="NaN or infinity"):
        nearest_images(rows(3, 0) / 0, rows(30, 1))
    samples = [torch.zeros(2, 3, 16, 16, dtype=torch.uint8)]
    with pytest.raises(UserError, match="holds images of 32 pixels"):
        find_copies(samples, 2, data, NeighboursConfig(), held_out=Rearranged(data, resolution=32))
    with pytest.raises(UserError, match="stores no images"):
        find_copies(samples, 2, Rearranged(data, has_images=False), NeighboursConfig())
    with pytest.raises(UserError, match="4 neighbours need more than 4 images, but there are 3"):
        find_copies(samples, 2, data, NeighboursConfig(num_images=3))
