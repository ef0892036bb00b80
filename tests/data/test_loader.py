import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from repa.base import files
from repa.base.errors import UserError
from repa.base.rng import fold
from repa.data import DataSet, Loader, PrepareConfig, open_data, prepare
from repa.data.order import permute
from repa.data.packing import pack
from repa.data.records import ArrayFile, FeatureField
from tests.oracles.data import endless_order
from tests.oracles.shards import sparse_data, write_data

FULL = PrepareConfig(resolution=8, shard_size=3, batch_size=4, num_workers=1, autoencoder="kl", features=("tiny",))


@pytest.fixture
def data(folder, tmp_path, fakes):
    prepare(folder, tmp_path / "out", FULL)
    return open_data(tmp_path / "out")


def background_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_prepared_data_knows_its_shapes_labels_and_source(data):
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


def test_the_order_is_the_documented_one(data):
    """Including batches that span two epochs, and one larger than three epochs."""
    permutations = [permute(np.arange(11), 11, fold(5, "epoch", e)) for e in range(12)]
    for batch_size in (4, 11, 36):
        loader = Loader(data, batch_size=batch_size, seed=5)
        for step in (2, 0, 1):  # in any order
            assert loader.indices(step).tolist() == endless_order(permutations, step * batch_size, batch_size)


def test_every_image_is_equally_likely_to_come_first():
    """Over epochs and seeds, every image comes first about equally often."""

    class Numbers(DataSet):
        def __init__(self): ...

        num_images, has_images, has_moments, features, stream, small_labels = 5, False, False, {}, None, None

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


def test_rows_of_all_fields_belong_to_the_same_images(data):
    loader = Loader(data, batch_size=5, seed=2, features=("tiny",), images=True, pooled=True)
    batch, indices = loader.batch(4), loader.indices(4)
    assert batch.labels.dtype == torch.int64
    assert batch.images.dtype == torch.uint8
    # the alignment converts them to float32
    assert batch.moments.dtype == batch.features["tiny"].patches.dtype == torch.float16
    assert batch.labels.tolist() == [0 if i < 7 else 1 for i in indices]
    np.testing.assert_array_equal(batch.images, data.gather("images", indices))
    red = batch.images[:, 0].float().mean((1, 2)) / 255
    torch.testing.assert_close(batch.moments[:, 0].float().mean((1, 2)), red, atol=1e-3, rtol=0)
    torch.testing.assert_close(batch.features["tiny"].pooled[:, 0].float(), red, atol=1e-3, rtol=0)


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


def test_errors_in_the_thread_are_raised_at_their_step(data, monkeypatch):
    loader = Loader(data, batch_size=1, seed=0)
    bad = int(loader.indices(5)[0])
    gather = data.reader.gather

    def failing(field, indices, out=None):
        if bad in indices:
            raise UserError("shard gone")
        return gather(field, indices, out)

    monkeypatch.setattr(data.reader, "gather", failing)
    seen = []
    with pytest.raises(UserError, match="shard gone"):
        for batch in loader.iterate():
            seen.append(batch)
    assert len(seen) == 5
    assert not background_threads()


def test_invalid_input_is_refused(data, folder, tmp_path):
    with pytest.raises(UserError, match="4 processes cannot share a batch of 10 images equally"):
        Loader(data, batch_size=10, seed=0, world=4)
    with pytest.raises(UserError, match=r"no tokens of 'dinov2-b' \(only tiny\)"):
        Loader(data, batch_size=4, seed=0, features=["dinov2-b"])
    prepare(folder, tmp_path / "lean", FULL.override(store_images=False))
    with pytest.raises(UserError, match="stores no images: prepare the data with --store-images"):
        Loader(open_data(tmp_path / "lean"), batch_size=4, seed=0, images=True)


def test_cifar_10_has_its_known_mean(tmp_path):
    """Needs real data in $REPA_TEST_DATA or ../shared/data."""
    root = Path(os.environ.get("REPA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
    path = root / "cifar10-test.zip"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    prepare(path, tmp_path / "out", PrepareConfig(resolution=32, num_workers=0))
    data = open_data(tmp_path / "out")
    assert data.manifest.class_counts == (1000,) * 10
    assert data.class_names[:3] == ("airplane", "automobile", "bird")
    # known mean of CIFAR-10: 0.4765
    assert data.gather("images", np.arange(10_000)).mean() == pytest.approx(121.5, abs=1)


class TestStored:
    """Data written by the test: tokens in every form, and many rows."""

    DIM, GRID = 6, 2

    def tokens(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).normal(size=(self.GRID**2, self.DIM)).astype(np.float32)

    @pytest.fixture
    def stored(self, tmp_path):
        """`dino-b` in float16 with pooled features, `mae-l` in int8, `tiny` as int8 coordinates in a basis."""
        basis = np.linalg.qr(np.random.default_rng(9).normal(size=(self.DIM, self.DIM)))[0].astype(np.float32)
        basis = np.concatenate([np.full((1, self.DIM), 0.25, np.float32), basis])
        folder = tmp_path / "stored"
        folder.mkdir()
        np.save(folder / "basis.tiny.npy", basis)
        path = folder / "basis.tiny.npy"
        record = ArrayFile(
            file=path.name, dtype="float32", shape=basis.shape, size=path.stat().st_size, sha256=files.sha256(path)
        )

        def packed(form: str, key: str, basis: np.ndarray | None = None):
            table = None if basis is None else torch.from_numpy(basis)
            return lambda i: pack(torch.from_numpy(self.tokens(i))[None], form, table)[key][0].numpy()

        extra = {
            "features.dino-b": packed("fp16", "features"),
            "pooled.dino-b": lambda i: self.tokens(i).mean(0).astype(np.float16),
            "features.mae-l": packed("int8", "features"),
            "scale.mae-l": packed("int8", "scale"),
            "features.tiny": packed(f"pca{self.DIM}-int8", "features", basis),
            "scale.tiny": packed(f"pca{self.DIM}-int8", "scale", basis),
        }
        facts = {"dim": self.DIM, "grid": self.GRID, "pooled": False, "identity": {}}
        features = {
            "dino-b": FeatureField(**{**facts, "pooled": True}),
            "mae-l": FeatureField(**facts, form="int8"),
            "tiny": FeatureField(**facts, form=f"pca{self.DIM}-int8", basis=record),
        }
        write_data(folder, (5, 4), extra=extra, features=features)
        return open_data(folder)

    def test_every_form_comes_out_as_tokens(self, stored):
        loader = Loader(stored, batch_size=4, seed=0, features=["dino-b", "mae-l", "tiny"], pooled=True)
        batch, indices = loader.batch(1), loader.indices(1)
        wanted = np.stack([self.tokens(i) for i in indices])
        for name, error in (("dino-b", 2e-3), ("mae-l", 0.02), ("tiny", 0.06)):
            patches = batch.features[name].patches
            assert patches.dtype == (torch.float16 if name == "dino-b" else torch.float32)
            assert tuple(patches.shape) == (4, 4, 6)
            assert np.abs(patches.numpy() - wanted).max() < error
        np.testing.assert_allclose(batch.features["dino-b"].pooled, wanted.mean(1), atol=2e-3)
        assert batch.features["mae-l"].pooled is None

    def test_fields_not_needed_at_a_step_are_not_read(self, stored, monkeypatch):
        asked = []
        gather = stored.reader.gather

        def watched(field, indices, out=None):
            asked.append(field)
            return gather(field, indices, out)

        monkeypatch.setattr(stored.reader, "gather", watched)
        loader = Loader(
            stored, batch_size=2, seed=0,
            features=lambda step: ("mae-l", "dino-b") if step < 2 else (), images=lambda step: step == 1,
        )  # fmt: skip
        stream = loader.iterate()
        batches = list(itertools.islice(stream, 4))
        stream.close()
        assert [sorted(batch.features) for batch in batches] == [["dino-b", "mae-l"]] * 2 + [[]] * 2
        assert [batch.images is not None for batch in batches] == [False, True, False, False]
        assert asked.count("features.mae-l") == asked.count("scale.mae-l") == asked.count("features.dino-b") == 2
        assert asked.count("images") == 1
        assert "pooled.dino-b" not in asked

    def test_ten_million_rows_need_no_more_memory_than_a_few(self, tmp_path):
        """With sparse files; an index of 8 bytes per row would take 76 MiB. The test reads 40 batches."""
        loader = Loader(sparse_data(tmp_path / "big", 10_000_000), batch_size=64, seed=0)
        list(itertools.islice(loader.iterate(), 4))  # allocates buffers and threads
        before = resident()
        stream = loader.iterate(10_000_000 // 64 - 20)  # over the end of an epoch
        batches = list(itertools.islice(stream, 40))
        stream.close()
        grown = resident() - before
        assert sum(len(batch.labels) for batch in batches) == 40 * 64
        assert len(np.unique(loader.indices(3))) == 64
        assert grown < 24 * 2**20, f"{grown / 2**20:.0f} MiB"


def resident() -> int:
    """Resident bytes of this process, including mapped files."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class TestLabels:
    """Labels of the whole data set are kept in memory, in the smallest integer type that fits."""

    def test_labels_take_one_byte_per_image(self, tmp_path, monkeypatch):
        write_data(tmp_path / "data", (5, 3, 0, 6))
        data = open_data(tmp_path / "data")
        loader = Loader(data, batch_size=7, seed=1)
        assert (data.small_labels.dtype, data.small_labels.tolist()) == (np.uint8, [i % 3 for i in range(14)])
        reads, real = [], data.reader.gather
        monkeypatch.setattr(
            data.reader, "gather", lambda field, *rest, **k: (reads.append(field), real(field, *rest, **k))[1]
        )
        for step in range(4):
            labels = loader.batch(step).labels
            assert (labels.dtype, labels.tolist()) == (torch.int64, (loader.indices(step) % 3).tolist())
        assert set(reads) == {"moments"}

    def test_labels_beyond_the_memory_limit_are_read_with_each_batch(self, tmp_path, monkeypatch):
        write_data(tmp_path / "data", (5, 9))
        batch = Loader(open_data(tmp_path / "data"), batch_size=7, seed=1).batch(1)
        monkeypatch.setattr("repa.data.dataset.LABELS_IN_MEMORY", 13)
        data = open_data(tmp_path / "data")
        assert data.small_labels is None
        assert torch.equal(Loader(data, batch_size=7, seed=1).batch(1).labels, batch.labels)

    @pytest.mark.parametrize("wrong", [-1, 3, 2, 256])  # 256 would be 0 in one byte
    def test_changed_labels_are_found_at_the_start(self, tmp_path, wrong):
        write_data(tmp_path / "data", (5, 9))
        path = tmp_path / "data" / "labels-00001.npy"
        labels = np.load(path)
        assert labels[1] == 0
        labels[1] = wrong
        np.save(path, labels)
        with pytest.raises(UserError, match="do not match the counts in its manifest: `repa check .* --full`"):
            Loader(open_data(tmp_path / "data"), batch_size=7, seed=1)

    def test_labels_include_mirrored_copies(self, folder, tmp_path):
        config = FULL.override(autoencoder="pixels", features=(), flip=True)
        prepare(folder, tmp_path / "out", config)
        data = open_data(tmp_path / "out")
        assert data.small_labels.tolist() == ([0] * 7 + [1] * 4) * 2
