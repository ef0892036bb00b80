"""One command at a time on what it writes, whoever was killed before."""

import os
import signal
import time

import pytest

from repa.base import files, lock
from repa.base.errors import UserError


def holding(target, seconds=30.0):
    """A process that holds the lock of `target`; gives its number once it has it."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with lock.alone(target, "repa train"):
            os.write(writer, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(reader, 1)
    return child


def test_the_second_is_told_who_and_a_kill_leaves_nothing_stale(tmp_path):
    target = tmp_path / "run"
    child = holding(target)
    try:
        with (
            pytest.raises(UserError, match=rf"repa train, process {child} on .*since") as refusal,
            lock.alone(target, "x"),
        ):
            pass
        assert str(target) in str(refusal.value)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock.alone(target, "repa train"):
        assert lock.lock_of(target).is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    target = tmp_path / "samples.npz"
    (tmp_path / ".samples.npz.abc.tmp").write_bytes(b"half")
    (tmp_path / ".other.npz.abc.tmp").write_bytes(b"of another")
    with lock.alone(target, "repa sample"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".other.npz.abc.tmp", ".samples.npz.lock"]


def test_a_folder_that_an_equal_command_made_is_done(tmp_path):
    def make(text):
        with files.new_folder(tmp_path / "out", "README.md", "the export") as folder:
            (folder / "README.md").write_text(text)

    make("a")
    make("a")
    with pytest.raises(UserError, match="choose another folder"):
        make("b")
    assert (tmp_path / "out/README.md").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
