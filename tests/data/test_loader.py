import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.base.rng import fold
from repa.data import Loader, PrepareConfig, open_data, prepare
from repa.data.prefetch import ahead
from tests.oracles.data import endless_order

FULL = PrepareConfig(resolution=8, shard_size=3, batch_size=4, num_workers=1, autoencoder="kl", features=("tiny",))


@pytest.fixture
def data(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL)
    return open_data(tmp_path / "out")


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_facts_of_the_data(data):
    assert (data.num_images, data.num_classes, data.class_names) == (11, 2, ("ants", "bees"))
    assert (data.latent_channels, data.latent_size, data.resolution, data.autoencoder) == (2, 2, 8, "kl")
    assert data.labels.tolist() == [0] * 7 + [1] * 4
    assert data.summary()["source"]["num_images"] == 11


def test_pixels_are_their_own_latents(folder, tmp_path):
    prepare(folder, tmp_path / "out", FULL.override(autoencoder="pixels", features=()))
    data = open_data(tmp_path / "out")
    assert (data.latent_channels, data.latent_size) == (3, 8)
    batch = Loader(data, batch_size=2, seed=0, images=True).batch(0)
    assert batch.moments is None
    assert batch.features == {}


def test_every_epoch_visits_every_image_once(data):
    loader = Loader(data, batch_size=4, seed=3)
    order = np.concatenate([loader.indices(step) for step in range(11)])  # 44 positions: 4 epochs
    epochs = order.reshape(4, 11)
    for epoch in epochs:
        assert sorted(epoch) == list(range(11))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_is_the_documented_one(data):
    """Batches that straddle epochs, and one that is larger than three of them."""
    permutations = [np.random.Generator(np.random.Philox(fold(5, "epoch", e))).permutation(11) for e in range(12)]
    for batch_size in (4, 11, 36):
        loader = Loader(data, batch_size=batch_size, seed=5)
        for step in (2, 0, 1):  # in any order
            assert loader.indices(step).tolist() == endless_order(permutations, step * batch_size, batch_size)


def test_order_of_all_images_is_equally_likely():
    """Every image comes first about equally often over epochs and seeds."""

    class Numbers:
        num_images, has_images, has_moments, features = 5, False, False, {}

    first = [Loader(Numbers(), batch_size=1, seed=s).indices(5 * e)[0] for s in range(40) for e in range(25)]
    counts = np.bincount(first, minlength=5)
    assert ((counts - 200) ** 2 / 200).sum() < 18.5  # chi-squared with 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_partition_the_same_global_batch(data, world):
    whole = Loader(data, batch_size=12, seed=1, features=["tiny"], images=True)
    parts = [
        Loader(data, batch_size=12, seed=1, features=["tiny"], images=True, rank=rank, world=world)
        for rank in range(world)
    ]
    for step in (0, 1, 7):
        batch, shares = whole.batch(step), [part.batch(step) for part in parts]
        assert all(len(share.labels) == 12 // world for share in shares)
        for field in ("labels", "images", "moments"):
            together = torch.cat([getattr(share, field) for share in shares])
            assert torch.equal(together, getattr(batch, field))
        together = torch.cat([share.features["tiny"].patches for share in shares])
        assert torch.equal(together, batch.features["tiny"].patches)


def test_rows_of_all_fields_belong_together(data):
    loader = Loader(data, batch_size=5, seed=2, features=("tiny",), images=True)
    batch, indices = loader.batch(4), loader.indices(4)
    assert batch.labels.dtype == torch.int64
    assert batch.images.dtype == torch.uint8
    assert batch.moments.dtype == batch.features["tiny"].patches.dtype == torch.float32
    assert batch.labels.tolist() == [0 if i < 7 else 1 for i in indices]
    np.testing.assert_array_equal(batch.images, data.gather("images", indices))
    red = batch.images[:, 0].float().mean((1, 2)) / 255
    torch.testing.assert_close(batch.moments[:, 0].mean((1, 2)), red, atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.features["tiny"].pooled[:, 0], red, atol=1e-3, rtol=0)


def test_iterate_gives_the_batches_from_any_step(data):
    loader = Loader(data, batch_size=4, seed=0, images=True)
    for start in (0, 3):
        stream = loader.iterate(start)
        for step, batch in enumerate(itertools.islice(stream, 6), start):
            assert torch.equal(batch.images, loader.batch(step).images)
        stream.close()
    assert not background_threads()


def test_threads_end_when_the_consumer_fails(data):
    loader = Loader(data, batch_size=4, seed=0)

    def consume():
        stream = loader.iterate()
        try:
            for _ in stream:
                raise KeyError("the training step")
        finally:
            stream.close()

    with pytest.raises(KeyError):
        consume()
    assert not background_threads()


def test_errors_of_the_thread_arrive_at_their_step(data, monkeypatch):
    loader = Loader(data, batch_size=1, seed=0)
    bad = int(loader.indices(5)[0])
    gather = data.gather

    def failing(field, indices):
        if bad in indices:
            raise UserError("shard gone")
        return gather(field, indices)

    monkeypatch.setattr(data, "gather", failing)
    seen = []
    with pytest.raises(UserError, match="shard gone"):
        for batch in loader.iterate():
            seen.append(batch)
    assert len(seen) == 5
    assert not background_threads()


def test_ahead_keeps_order_and_stays_a_few_items_ahead():
    started = []

    def square(x):
        started.append(x)
        return x * x

    stream = ahead(square, itertools.count(), depth=3, workers=2)
    assert [next(stream) for _ in range(10)] == [x * x for x in range(10)]
    stream.close()
    assert len(started) <= 13
    assert list(ahead(square, [], depth=3)) == []
    assert list(ahead(square, [7], depth=3)) == [49]


def test_mistakes_are_said(data, folder, tmp_path):
    with pytest.raises(UserError, match="A batch of 10 images cannot be shared equally by 4 processes"):
        Loader(data, batch_size=10, seed=0, world=4)
    with pytest.raises(UserError, match=r"no tokens of 'dinov2-b' \(it holds tiny\)"):
        Loader(data, batch_size=4, seed=0, features=["dinov2-b"])
    prepare(folder, tmp_path / "lean", FULL.override(store_images=False))
    with pytest.raises(UserError, match="holds no images: prepare it with --store-images"):
        Loader(open_data(tmp_path / "lean"), batch_size=4, seed=0, images=True)


def test_cifar(tmp_path):
    """Real data, where it is at hand: $REPA_TEST_DATA or ../shared/data."""
    root = Path(os.environ.get("REPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / "cifar10-test.zip"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    prepare(path, tmp_path / "out", PrepareConfig(resolution=32))
    data = open_data(tmp_path / "out")
    assert data.manifest.class_counts == (1000,) * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    assert data.gather("images", np.arange(10_000)).mean() == pytest.approx(
        121.5, abs=1
    )  # known mean of CIFAR-10: 0.4765
