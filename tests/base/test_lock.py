"""Locks on output: one command at a time, and no stale lock after a kill."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from repa.base import files, lock
from repa.base.errors import UserError


def holding(target, seconds=30.0):
    """Start a process that holds the lock of `target`; returns its process number once it has the lock."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with lock.exclusive(target, "repa train"):
            os.write(writer, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(reader, 1)
    return child


def test_the_holder_is_named_and_a_kill_leaves_no_stale_lock(tmp_path):
    target = tmp_path / "run"
    child = holding(target)
    try:
        with (
            pytest.raises(UserError, match=rf"repa train, process {child} on .*since") as refusal,
            lock.exclusive(target, "x"),
        ):
            pass
        assert str(target) in str(refusal.value)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock.exclusive(target, "repa train"):
        assert lock.lock_of(target).is_file()
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    target = tmp_path / "samples.npz"
    (tmp_path / ".samples.npz.abcdefgh.tmp").write_bytes(b"half")
    (tmp_path / ".other.npz.abc.tmp").write_bytes(b"of another")
    with lock.exclusive(target, "repa sample"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".other.npz.abc.tmp", ".samples.npz.lock"]


def test_files_that_another_command_is_writing_stay(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    theirs = [".run.npz.abcdefgh.tmp", ".other.abcdefgh.tmp", ".notes.tmp"]
    for name in theirs:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "run")
    for target in (tmp_path / "run", Path(".")):
        with lock.exclusive(target, "repa train"):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*theirs, "run"])


def test_two_names_of_a_folder_have_one_lock(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with (
        lock.exclusive(tmp_path / "run", "repa train"),
        pytest.raises(UserError, match="repa train"),
        lock.exclusive(tmp_path / "link", "repa sample"),
    ):
        pass


@pytest.mark.parametrize("code", lock.NO_LOCKS)
def test_without_file_locks_a_killed_holder_blocks_nobody(code, tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    if (child := os.fork()) == 0:
        with lock.exclusive(tmp_path / "run", "repa train"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with pytest.warns(UserWarning, match="has no locks"), lock.exclusive(tmp_path / "run", "repa train"):
        pass
    assert not list(tmp_path.iterdir())
    for hold in (lock.shared(tmp_path / "data", "repa prepare"), lock.held(tmp_path / "claim.lock")):
        with pytest.warns(UserWarning, match="has no locks"), hold:
            pass


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path):
    path = tmp_path / "claim.lock"
    handle = lock.take(path)
    (started, start), (end, ending) = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.write(start, b"x")
        os.read(end, 1)
        os._exit(0)
    os.read(started, 1)
    assert lock.take(path) is None
    lock.release(handle)
    assert lock.take(path) is not None
    os.write(ending, b"x")


def test_a_copy_that_a_new_process_has_not_closed_yet_does_not_keep_a_released_lock(tmp_path):
    path = tmp_path / "claim.lock"
    handle = lock.take(path)
    copy = os.dup(handle)
    lock.release(handle)
    assert lock.take(path) is not None
    os.close(copy)


def test_a_forked_process_that_leaves_the_block_changes_no_lock_and_no_file(tmp_path):
    with contextlib.ExitStack() as held:
        held.enter_context(lock.exclusive(tmp_path / "run", "repa train"))
        held.enter_context(lock.held(tmp_path / "claim.lock"))
        if (child := os.fork()) == 0:
            opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]  # with the numbers of the two locks
            held.close()
            os._exit(sum(os.fstat(number).st_size for number in opened))
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(UserError, match="repa train"), lock.exclusive(tmp_path / "run", "x"):
            pass


def waiting(path):
    """Start a thread that waits for a lock; returns it and a list of what it gets."""
    found = []
    thread = threading.Thread(target=lambda: found.append(lock.take(path, wait=True)))
    thread.start()
    time.sleep(0.2)
    return thread, found


def test_a_process_forked_while_a_thread_waits_does_not_keep_the_lock(tmp_path):
    path = tmp_path / "claim.lock"
    handle = lock.take(path)
    thread, found = waiting(path)
    end, ending = os.pipe()
    if os.fork() == 0:
        os.close(ending)  # so that the process ends if the test fails
        os.read(end, 1)
        os._exit(0)
    lock.release(handle)
    thread.join()
    lock.release(found[0])
    assert lock.take(path) is not None
    os.write(ending, b"x")


def test_a_folder_that_is_removed_while_a_process_waits_for_its_lock_is_made_again(tmp_path):
    path = tmp_path / "parts/finish.lock"
    handle = lock.take(path)
    thread, found = waiting(path)
    files.remove_folder(path.parent)
    lock.release(handle)
    thread.join()
    assert found[0] is not None
    assert lock.take(path) is None


def test_an_equal_folder_may_be_written_again_but_another_is_refused(tmp_path):
    def make(text):
        with files.new_folder(tmp_path / "out", "README.md", "the export") as folder:
            (folder / "README.md").write_text(text)

    make("a")
    make("a")
    with pytest.raises(UserError, match="choose another folder"):
        make("b")
    assert (tmp_path / "out/README.md").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_shared_lock_excludes_an_exclusive_one(tmp_path):
    target = tmp_path / "data"
    child = holding(target)
    try:
        with pytest.raises(UserError, match=rf"repa train, process {child} on "), lock.shared(target, "repa prepare"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock.shared(target, "repa prepare"):
        with (
            pytest.raises(UserError, match=f"repa prepare, process {os.getpid()} on "),
            lock.exclusive(target, "repa prepare --remove"),
        ):
            pass
        with lock.shared(target, "repa prepare"):
            pass
        assert lock.lock_of(target).is_file()  # another holder remains
    assert list(tmp_path.iterdir()) == []
