"""Data at a URL: fetched, verified, cached within a limit, and read in a suitable order."""

import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from repa.base import files
from repa.base.errors import UserError
from repa.data import Loader, open_data, remote
from tests.oracles.shards import label, moments, write_data

SIZES = (5, 3, 0, 6, 4, 4, 7)
TOTAL = sum(SIZES)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    write_data(tmp_path / "data", SIZES)
    return tmp_path / "data"


@pytest.fixture
def store(folder):
    """The folder as memory://data."""
    memory = fsspec.filesystem("memory")
    upload(folder, memory)
    yield memory
    memory.store.clear()


def upload(folder: Path, memory) -> None:
    for path in folder.iterdir():
        memory.pipe(f"/data/{path.name}", path.read_bytes())


@pytest.fixture
def fetched(monkeypatch):
    """The names of fetched files."""
    names, real = [], fsspec.implementations.memory.MemoryFileSystem.get_file

    def get_file(self, place, *arguments, **options):
        names.append(place.rpartition("/")[2])
        time.sleep(0.01)  # gives other readers time to ask for it
        return real(self, place, *arguments, **options)

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "get_file", get_file)
    return names


def cached() -> list[str]:
    return sorted(path.name for path in (files.cache_folder() / "streams").glob("*/*.npy"))


@pytest.mark.parametrize("protocol", ["memory://data", "file://{folder}"])
def test_rows_match_the_local_folder(folder, store, protocol):
    data = open_data(protocol.format(folder=folder))
    assert (data.num_images, data.class_names, data.folder) == (TOTAL, ("a", "b", "c"), protocol.format(folder=folder))
    indices = [TOTAL - 1, 3, 3, 8, 0]
    np.testing.assert_array_equal(data.gather("moments", indices), np.stack([moments(i) for i in indices]))


def test_only_files_that_are_read_are_fetched_and_only_once(store, fetched):
    data = open_data("memory://data")
    assert fetched == []  # the manifest is read without the cache
    data.gather("moments", [0, 4])
    data.gather("moments", [1, 9])
    assert fetched == ["moments-00000.npy", "moments-00003.npy"]
    open_data("memory://data").gather("moments", [2])  # stands for another process
    assert len(fetched) == 2


def test_concurrent_readers_fetch_a_file_once(store, fetched):
    data = [open_data("memory://data") for _ in range(6)]
    threads = [threading.Thread(target=d.gather, args=("moments", [0])) for d in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fetched == ["moments-00000.npy"]


def test_bytes_that_contradict_the_manifest_are_refused_and_not_cached(store):
    data = open_data("memory://data")
    name = next(name for name in store.store if name.endswith("moments-00003.npy"))
    content = bytearray(store.cat(name))
    content[-1] ^= 1
    store.pipe(name, bytes(content))
    with pytest.raises(
        UserError, match=r"memory://data/moments-00003\.npy does not match the checksum in its manifest"
    ):
        data.gather("moments", [9])
    assert cached() == []


def test_new_data_at_the_same_url_is_not_mixed_with_the_old(store, tmp_path):
    before = open_data("memory://data").gather("moments", [0])
    write_data(tmp_path / "other", SIZES, extra={"moments": lambda i: moments(i + 1)})
    upload(tmp_path / "other", store)
    after = open_data("memory://data").gather("moments", [0])
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after[0], moments(1))


def test_the_cache_stays_within_its_limit_and_drops_the_least_recently_used(store, fetched, monkeypatch):
    shards = open_data("memory://data").manifest.shards
    room = sum(shards[number].files["moments"].size for number in (0, 3, 4))  # shard 1 is smaller than shard 4
    monkeypatch.setenv("REPA_STREAM_GB", str((room + 10) / 1e9))
    data = open_data("memory://data")
    starts = data.reader.starts
    clock = itertools.count(1_000_000_000)
    monkeypatch.setattr(os, "utime", lambda path, real=os.utime: real(path, (0, next(clock))))
    for shard in (0, 1, 3):
        data.gather("moments", [starts[shard]])
    open_data("memory://data").gather("moments", [starts[0]])  # use it again
    data.gather("moments", [starts[4]])
    assert cached() == ["moments-00000.npy", "moments-00003.npy", "moments-00004.npy"]
    # still readable because it is open
    np.testing.assert_array_equal(data.gather("moments", [starts[1]])[0], moments(int(starts[1])))
    assert fetched.count("moments-00001.npy") == 1


def test_a_copy_evicted_by_another_process_is_fetched_again(tmp_path, monkeypatch):
    """Keys with other leading digits have another lock."""
    cache, fetched = remote.FileCache(tmp_path, limit=100), []

    def fetch(path):
        path.write_bytes(b"shard")
        fetched.append(path)

    path = cache.path("00", "shard", fetch)
    monkeypatch.setattr(os, "utime", lambda used, real=os.utime: (path.unlink(missing_ok=True), real(used)))
    assert cache.path("00", "shard", fetch) == path
    assert path.read_bytes() == b"shard"
    assert len(fetched) == 2


def test_requests_to_a_flaky_store_are_retried(store, monkeypatch):
    kind, attempts = fsspec.implementations.memory.MemoryFileSystem, []
    real = kind.get_file

    def flaky(self, place, *arguments, **options):
        attempts.append(place)
        if len(attempts) % 3:
            raise TimeoutError("slow down")
        return real(self, place, *arguments, **options)

    monkeypatch.setattr(kind, "get_file", flaky)
    np.testing.assert_array_equal(open_data("memory://data").gather("moments", [0])[0], moments(0))
    monkeypatch.setattr(kind, "get_file", lambda *a, **o: (_ for _ in ()).throw(TimeoutError("slow down")))
    with pytest.raises(UserError, match=r"memory://data/labels-00000\.npy cannot be read: slow down"):
        open_data("memory://data").gather("labels", [0])


def test_shards_are_requested_ahead_only_once(store, fetched, monkeypatch):
    """All shards are in the first window, so every step needs the same shards."""
    asked, path = [], remote.RemoteFiles.path

    def watched(self, record):
        if threading.current_thread().name.startswith("ahead-fetch"):
            asked.append(record.file)
        return path(self, record)

    monkeypatch.setattr(remote.RemoteFiles, "path", watched)
    stream = Loader(open_data("memory://data"), batch_size=6, seed=4).iterate()
    for _ in range(10):
        next(stream)
    stream.close()
    assert sorted(asked) == sorted(
        f"{field}-{k:05d}.npy" for field in ("labels", "moments") for k in (0, 1, 3, 4, 5, 6)
    )


def test_batches_are_the_same_for_any_number_of_processes_and_from_any_step(store, folder, monkeypatch):
    monkeypatch.setattr("repa.data.order.WindowShuffle.__init__.__defaults__", (2,))
    data = open_data("memory://data")
    whole = Loader(data, batch_size=6, seed=4)
    order = np.concatenate([whole.indices(step) for step in range(TOTAL)])
    for epoch in order[: 6 * TOTAL // TOTAL * TOTAL].reshape(-1, TOTAL):
        assert sorted(epoch) == list(range(TOTAL))
    stream = whole.iterate(3)
    for step in range(3, 20):
        batch = next(stream)
        assert batch.labels.tolist() == [label(i) for i in whole.indices(step)]
        np.testing.assert_array_equal(batch.moments[:, 0, 0, 0], [moments(i)[0, 0, 0] for i in whole.indices(step)])
        parts = [Loader(data, batch_size=6, seed=4, rank=r, world=3).batch(step).moments for r in range(3)]
        assert torch.equal(torch.cat(parts), batch.moments)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_only_needed_fields_of_the_next_window_are_fetched_ahead(store, fetched, monkeypatch):
    """With windows of 2 of 6 shards, the first batch starts fetching the second window but not the third."""
    monkeypatch.setattr("repa.data.order.WindowShuffle.__init__.__defaults__", (2,))
    monkeypatch.setattr("repa.data.loader.DEPTH", 1)
    data = open_data("memory://data")
    loader = Loader(data, batch_size=1, seed=0)
    stream = loader.iterate()
    next(stream)
    expected = loader.order.shards_from(0, 0)
    wanted = {f"{field}-{shard:05d}.npy" for shard in expected for field in ("labels", "moments") if SIZES[shard]}
    deadline = threading.Event()
    for _ in range(200):
        if set(fetched) >= wanted:
            break
        deadline.wait(0.01)
    assert set(fetched) == wanted
    stream.close()


def test_invalid_input_is_refused(store, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"memory://nothing/manifest\.json does not exist"):
        open_data("memory://nothing")
    with pytest.raises(UserError, match=r"nosuch://data/manifest\.json cannot be opened: .*nosuch"):
        open_data("nosuch://data")
    for value in ("many", "0", "-3", "inf", "nan"):
        monkeypatch.setenv("REPA_STREAM_GB", value)
        with pytest.raises(UserError, match="REPA_STREAM_GB is .*: it is the size of the cache in GB"):
            open_data("memory://data")
    monkeypatch.setenv("REPA_STREAM_GB", "0.000001")
    with pytest.raises(
        UserError, match=r"Streaming memory://data needs .* GB of cache, but REPA_STREAM_GB allows 0\.0"
    ):
        Loader(open_data("memory://data"), batch_size=2, seed=0)


def test_a_hostile_manifest_cannot_write_elsewhere(store, tmp_path):
    manifest = json.loads(store.cat("/data/manifest.json"))
    # like a foreign manifest
    text = json.dumps({name: value for name, value in manifest.items() if name != files.SEAL})
    checksum = text.split('"sha256": "')[1][:64]
    store.pipe("/data/manifest.json", text.replace(checksum, "../../../escaped").encode())
    data = open_data("memory://data")
    with pytest.raises(UserError, match="is damaged: the checksum of .* is '../../../escaped'"):
        for field in ("labels", "moments", "images"):
            data.gather(field, [0])
    assert not list(tmp_path.rglob("escaped*"))


def test_a_changed_manifest_is_named_by_its_url(store):
    store.pipe("/data/manifest.json", store.cat("/data/manifest.json").replace(b'"num_images": ', b'"num_images": 1'))
    with pytest.raises(UserError, match=r"^memory://data/manifest\.json does not match its checksum"):
        open_data("memory://data")


def test_a_run_on_a_url_differs_only_in_the_order_of_images(data_folder, tmp_path):
    """Rows have the same names and values but come in other batches."""
    here, there = open_data(data_folder), open_data(f"file://{data_folder}")
    assert there.summary() == here.summary()
    assert there.stream is not None
    np.testing.assert_array_equal(there.labels, here.labels)
    there.check()
    copy = Path(shutil.copytree(data_folder, tmp_path / "copy"))
    next(copy.glob("labels-*.npy")).unlink()
    with pytest.raises(UserError, match="labels-00000"):
        open_data(f"file://{copy}").reader.path(here.manifest.shards[0].files["labels"].override(sha256="0" * 64))
