"""Rows by position: how reads are merged, and what happens when files change meanwhile."""

import gc
import os
import resource

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.data import open_data, reader
from tests.oracles.shards import label, moments, write_data

SIZES = (5, 3, 0, 6)


@pytest.fixture
def data(tmp_path):
    write_data(tmp_path / "data", SIZES)
    return open_data(tmp_path / "data")


@pytest.fixture
def reads(monkeypatch):
    """The sizes of all reads."""
    sizes, real = [], os.preadv

    def preadv(handle, buffers, position):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(handle, buffers, position)

    monkeypatch.setattr(os, "preadv", preadv)
    return sizes


def test_rows_match_the_images(data):
    for indices in ([13, 0, 5, 5, 4, 7, 8], [0], range(14), [6, 7, 8, 9, 1, 2, 3]):
        np.testing.assert_array_equal(data.gather("moments", indices), np.stack([moments(i) for i in indices]))
        assert data.gather("labels", indices).tolist() == [label(i) for i in indices]


def test_consecutive_rows_are_one_read(data, reads):
    size = moments(0).nbytes
    data.gather("moments", range(14))
    assert sorted(reads) == [3 * size, 5 * size, 6 * size]
    reads.clear()
    data.gather("moments", [9, 10, 2, 11])  # 9 and 10 are neighbours in the file and in the result, 11 only in the file
    assert sorted(reads) == [size, size, 2 * size]


def test_rows_are_read_into_the_given_buffer(data):
    whole = np.zeros((4, *moments(0).shape), np.float16)
    assert data.gather("moments", [3, 12], out=whole[1:3]).base is not None
    np.testing.assert_array_equal(
        whole, [np.zeros_like(moments(0)), moments(3), moments(12), np.zeros_like(moments(0))]
    )
    with pytest.raises(AssertionError):
        data.gather("moments", [3, 12], out=whole[:1])
    with pytest.raises(AssertionError):
        data.gather("moments", [3], out=np.zeros((1, *moments(0).shape), np.float32))


def test_short_reads_are_continued(data, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: real(handle, [buffers[0][:7]], at))
    np.testing.assert_array_equal(data.gather("moments", [13, 2]), np.stack([moments(13), moments(2)]))


def test_a_file_truncated_while_open_gives_an_error(data):
    data.gather("moments", [0])
    path = data.folder / "moments-00000.npy"
    os.truncate(path, 300)
    with pytest.raises(UserError, match=r"moments-00000\.npy was truncated while it was read: delete it and run"):
        data.gather("moments", [4])


def test_other_versions_of_the_format_are_refused(data):
    path = data.folder / "labels-00001.npy"
    with open(path, "r+b") as file:
        file.seek(6)
        file.write(b"\x02")
    with pytest.raises(UserError, match=r"labels-00001\.npy is not an \.npy file of version 1\.0"):
        data.gather("labels", [6])


def test_files_evicted_from_the_cache_are_closed(data, monkeypatch):
    monkeypatch.setattr("repa.data.reader.MAX_OPEN", 2)
    rows = open_data(data.folder).reader
    before = len(os.listdir("/dev/fd"))
    for _ in range(3):
        for field in ("labels", "moments", "images"):
            rows.gather(field, range(14))
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before + 2


@pytest.mark.parametrize(
    ("soft", "hard", "num", "raised", "kept"),
    [
        (1024, 4096, 300, 1024, 300),  # the limit allows it
        (1024, 4096, 2000, 2500, 2000),
        (1024, resource.RLIM_INFINITY, 2000, 2500, 2000),
        (1024, 2000, 3000, 2000, 1500),  # limited by the maximum
        (256, 256, 3000, 256, 64),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2000, resource.RLIM_INFINITY, 2000),
        (1024, 1 << 20, 10**6, 60_500, 60_000),
    ],
)
def test_the_open_file_limit_is_raised_for_many_shards(monkeypatch, soft, hard, num, raised, kept):
    limits = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.append(new))
    assert reader._descriptors(num) == kept
    assert limits[-1] == (raised, hard)


def test_a_reader_needs_only_the_files_it_reads(data):
    (data.folder / "moments-00001.npy").unlink()
    with pytest.raises(UserError, match=r"moments-00001\.npy is missing"):
        open_data(data.folder)
    rows = reader.ShardReader(data.folder, data.manifest.shards)
    assert rows.gather("labels", [6]).tolist() == [label(6)]
    with pytest.raises(UserError, match=r"moments-00001\.npy cannot be opened"):
        rows.gather("moments", [6])
