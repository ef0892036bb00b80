"""Features by key: intact, bounded, shared by processes, and of one encoder."""

import hashlib
import json
import multiprocessing
import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from repa.base.errors import UserError
from repa.base.images import to_tensor
from repa.data import FeatureCache, PrepareConfig, open_data, open_source, prepare
from repa.encoders import load_encoder


def rows(*numbers):
    return torch.stack([torch.full((4, 3), float(n)) for n in numbers])


def computed(log):
    def compute(positions):
        log.append(list(positions))
        return rows(*positions)

    return compute


def test_only_missing_features_are_computed(tmp_path):
    log, cache = [], FeatureCache.open(tmp_path / "cache", "an encoder")
    assert torch.equal(cache.fill(["a", "b"], computed(log)), rows(0, 1))
    assert torch.equal(cache.fill(["b", "c", "a"], computed(log)), rows(1, 1, 0))
    assert log == [[0, 1], [1]]
    again = FeatureCache.open(tmp_path / "cache", "an encoder")
    assert len(again) == 3
    assert "c" in again
    assert torch.equal(again[["c", "a"]], rows(1, 0))
    assert torch.equal(again["b"], rows(1)[0])
    with pytest.raises(UserError, match="'d'"):
        again[["a", "d"]]


def test_a_process_sees_what_another_added(tmp_path):
    first, second = (FeatureCache.open(tmp_path / "cache") for _ in range(2))
    first.add(["a"], rows(7))
    assert torch.equal(second[["a"]], rows(7))


def _fill(folder, start):
    cache = FeatureCache.open(folder)
    for key in range(start, start + 20):
        cache.fill([key, key + 1], lambda missing, key=key: rows(*(key + m for m in missing)))


def test_processes_fill_one_folder_concurrently(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path / "cache", start)) for start in (0, 10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert torch.equal(FeatureCache.open(tmp_path / "cache")[list(range(31))], rows(*range(31)))


def test_nothing_is_stored_beyond_the_limit(tmp_path):
    cache = FeatureCache.open(tmp_path / "cache", limit=1500)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for key in range(40):
            assert torch.equal(cache.fill([key], lambda _, key=key: rows(key)), rows(key))
    assert ["full" in str(warning.message) for warning in said] == [True]
    stored = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert 1000 < stored <= 1500
    assert 0 in cache
    assert 39 not in cache


@pytest.mark.parametrize("damage", ["byte", "cut", "header", "gone"])
def test_damaged_entries_are_computed_again(tmp_path, damage):
    FeatureCache.open(tmp_path / "cache").add(["a", "b"], rows(1, 2))
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "byte":
        content[-1] ^= 255  # of the last entry
    elif damage == "cut":
        del content[-8:]
    elif damage == "header":
        content = content.replace(b'keys":"[', b'keys":"{')
    path.write_bytes(content)
    if damage == "gone":
        cache = FeatureCache.open(tmp_path / "cache")
        path.unlink()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = FeatureCache.open(tmp_path / "cache")
    log = []
    assert torch.equal(cache.fill(["a", "b"], lambda missing: log.append(missing) or rows(1, 2)[missing]), rows(1, 2))
    assert log == ([[1]] if damage == "byte" else [[0, 1]])
    assert torch.equal(FeatureCache.open(tmp_path / "cache")[["a", "b"]], rows(1, 2))


def test_another_encoder_shape_or_folder_is_refused(tmp_path):
    cache = FeatureCache.open(tmp_path / "cache", "one")
    cache.add(["a"], rows(1))
    with pytest.raises(UserError, match="not of other"):
        FeatureCache.open(tmp_path / "cache", "other")
    with pytest.raises(UserError, match="use another folder"):
        cache.add(["b"], torch.zeros(1, 5, 3))
    with pytest.raises(UserError, match="not finite as fp16"):
        cache.add(["b"], rows(1) * 1e6)
    with pytest.raises(UserError, match="do not match"):
        cache.add(["b", "c"], rows(1))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="neither"):
        FeatureCache.open(tmp_path / "own")


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_prepared_features_are_read_by_image_number(tmp_path, form):
    config = PrepareConfig(resolution=32, features=("tiny",), feature_forms={"": form}, num_workers=0)
    prepare("photographs:num=6", tmp_path / "data", config)
    cache = FeatureCache.open(tmp_path / "data")
    assert len(cache) == len(open_data(tmp_path / "data")) == 6
    source, encoder = open_source("photographs:num=6"), load_encoder("tiny")
    images = torch.stack([to_tensor(source.image(i, 32)) for i in (4, 1)])
    expected = encoder(images, grid=int(cache.shape[0] ** 0.5)).patches
    torch.testing.assert_close(cache[np.array([4, 1])], expected, atol=0.05, rtol=0.02)
    assert torch.equal(cache[4], cache[[4, 1]][0])
    assert 6 not in cache
    with pytest.raises(UserError, match="from 0 to 5"):
        cache[[6]]
    with pytest.raises(UserError, match="has no features of .* choose from tiny"):
        FeatureCache.open(tmp_path / "data", "dinov2-b")


def _checksum(row):
    return hashlib.blake2b(row.contiguous().view(torch.uint8).numpy(), digest_size=16).hexdigest()


def _strangers_file(folder, entries, **header):
    """A foreign file with correct checksums in a cache of (4, 3) features."""
    facts = {"keys": json.dumps(["a"]), "checksums": json.dumps([_checksum(row) for row in entries]), **header}
    save_file({"features": entries}, folder / f"{'a' * 32}.safetensors", metadata=facts)


@pytest.mark.parametrize(
    "header",
    [
        {"keys": "[" * 100_000},
        {"keys": "[1]"},
        {"keys": "7"},
        {"keys": "{}"},
        {"checksums": "null"},
        {"keys": "9" * 5000},
    ],
)
def test_entries_with_a_wrong_header_are_ignored(tmp_path, header):
    FeatureCache.open(tmp_path / "cache").add(["b"], rows(2))
    _strangers_file(tmp_path / "cache", rows(1), **header)
    with pytest.warns(UserWarning, match="skipped"):
        cache = FeatureCache.open(tmp_path / "cache")
    assert len(cache) == 1
    assert torch.equal(cache["b"], rows(2)[0])


@pytest.mark.parametrize("kind", ["fifo", "device", "broken link", "folder"])
def test_special_files_are_not_opened(tmp_path, kind):
    FeatureCache.open(tmp_path / "cache").add(["b"], rows(2))
    path = tmp_path / "cache" / f"{'a' * 32}.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    with pytest.warns(UserWarning, match="skipped"):
        assert len(FeatureCache.open(tmp_path / "cache")) == 1


def test_entries_of_another_type_or_not_finite_are_computed_again(tmp_path):
    for number, entries in enumerate(
        (rows(1).double(), rows(1).bool(), rows(1).to(torch.complex64), rows(1) * torch.nan)
    ):
        folder = tmp_path / str(number)
        FeatureCache.open(folder).add(["b"], rows(2))
        _strangers_file(folder, entries)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = FeatureCache.open(folder)
        assert torch.equal(cache.fill(["a"], lambda missing: rows(5)), rows(5))


def test_invalid_calls_of_the_cache_are_refused(tmp_path):
    cache = FeatureCache.open(tmp_path / "cache", {"layers": (1, 2)})
    for keys, features in ((["a"], torch.tensor(1.0)), ([], torch.ones(0, 4, 3)), (["a"], rows(1, 2))):
        with pytest.raises(UserError, match="keys do not match"):
            cache.add(keys, features)
    cache.add(["a"], rows(1))
    assert len(FeatureCache.open(tmp_path / "cache", {"layers": (1, 2)})) == 1  # JSON has no tuples
    assert cache.fill([], lambda missing: rows()).shape == (0, 4, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose an empty folder"):
        FeatureCache.open(tmp_path / "file")


def test_a_cache_just_created_by_another_process_is_opened(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".cache.json.abcdefgh.tmp").touch()
    assert FeatureCache.open(tmp_path).fill([0], lambda missing: torch.ones(1, 2, 3)).shape == (1, 2, 3)


def test_a_folder_that_cannot_be_created_is_reported():
    with pytest.raises(UserError, match=r"/proc/features accepts no new files. Choose another folder"):
        FeatureCache.open("/proc/features", "enc").add(["a"], torch.zeros(1, 2, 3))
