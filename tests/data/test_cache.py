"""A cache folder of limited size."""

import os

from repa.data.remote import FileCache


def test_the_least_recently_used_file_is_removed_first_and_partial_files_stay(tmp_path):
    cache, fetched = FileCache(tmp_path, 25), []

    def get(key):
        return cache.path(key, "file", lambda path: (fetched.append(key), path.write_bytes(key.encode() * 5))[1])

    under_way = tmp_path / "ff" / ".file.1234.tmp"  # of another process
    under_way.parent.mkdir()
    under_way.write_bytes(b"x" * 100)
    os.utime(under_way, (0, 0))
    for time, key in enumerate(["aa", "bb", "aa", "cc"]):  # each has 10 bytes
        os.utime(get(key), (time, time))
    assert sorted(path.parent.name for path in tmp_path.glob("*/file")) == ["aa", "cc"]
    assert under_way.is_file()
    assert get("bb").read_bytes() == b"bbbbbbbbbb"
    assert fetched == ["aa", "bb", "cc", "bb"]


def test_a_partial_file_of_a_killed_process_is_removed_by_the_next_fetch(tmp_path):
    left = tmp_path / "aa" / ".file.12345678.tmp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    path = FileCache(tmp_path, 100).path("aa", "file", lambda path: path.write_bytes(b"whole"))
    assert (path.read_bytes(), left.exists()) == (b"whole", False)


def test_a_file_of_another_size_is_fetched_again(tmp_path):
    cache = FileCache(tmp_path, 100)
    cache.path("aa", "file", lambda path: path.write_bytes(b"old"))
    assert cache.path("aa", "file", lambda path: path.write_bytes(b"whole"), size=5).read_bytes() == b"whole"
