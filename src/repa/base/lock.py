"""Locks on outputs: the system releases them when their process ends, and errors name the holder."""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from repa.base import files
from repa.base.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without locks
TRIES = 20  # attempts to share a lock, within a second


def take(path: Path, *, wait: bool = False) -> BaseFileLock | None:
    """Lock a file; None if another process has it. `release` or the end of the process frees it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Acquired and released by different threads. A soft lock (a mere file) would outlive a killed holder.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


def release(lock: BaseFileLock) -> None:
    lock.release(force=True)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock and hold it in the block."""
    lock = take(path, wait=True)
    assert lock is not None  # because wait=True blocks
    try:
        yield
    finally:
        release(lock)


def lock_of(target: Path) -> Path:
    """The path of the lock of a file or folder: beside it, or inside a folder whose parent cannot be written.

    Links are resolved, so that two names of one folder share a lock.
    """
    target = Path(os.path.realpath(target))
    inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target / ".lock" if inside else target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def exclusive(target: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a file or folder that the block writes; the lock is removed afterwards.

    Args:
        target: what is written.
        doing: the command that others see: "repa train".

    Raises:
        UserError: another process holds the lock; the message names it, its host and its start time.
    """
    path = _usable_lock(target)
    if (lock := take(path)) is None:
        raise _refusal(target, path)
    if not lock.is_locked:
        warnings.warn(
            f"The file system of {target} has no locks: make sure that no other command writes there.", stacklevel=3
        )
    place = Path(os.path.abspath(target))  # "." has no name
    files.remove_leftovers(place.parent, place.name.__eq__)  # from a killed writer
    try:
        _sign(path, doing)
        yield
    finally:
        # Removed while held: a waiting process finds that the file is no longer the one of this name, and tries again.
        with contextlib.suppress(OSError):
            path.unlink()
        release(lock)


@contextlib.contextmanager
def shared(target: Path, doing: str) -> Iterator[None]:
    """Hold a shared lock of a folder, which excludes `exclusive`.

    It uses the same file as `exclusive`, which is impossible with filelock's ReadWriteLock, a SQLite database.

    Args:
        target: what is written.
        doing: the command, for others: "repa prepare".

    Raises:
        UserError: another process holds it alone; the message names it, its host and its start time.
    """
    import fcntl  # missing on Windows, where the rest of the package can be imported

    path = _usable_lock(target)
    if (handle := _share(path)) is None:
        raise _refusal(target, path)
    try:
        _sign(path, doing)
        yield
    finally:
        with contextlib.suppress(OSError):
            # The last process removes the file: locking it alone fails while others share it.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(handle)


def _share(path: Path) -> int | None:
    """An open file with a shared lock; None if a process has it alone. Retries for a second, because a leaving process locks it briefly."""
    import fcntl

    for _ in range(TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                return handle
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            time.sleep(1 / TRIES)
            continue
        # The last holder may have removed the file after it was opened: a lock on an unnamed file would exclude nobody.
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)
    return None


def _usable_lock(target: Path) -> Path:
    path = lock_of(target)
    files.require_place(path.parent, target)
    return path


def _sign(path: Path, doing: str) -> None:
    """Write who holds the lock, for others; it holds without this too, as on a full disk."""
    record = {"doing": doing, "host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
    with contextlib.suppress(OSError):
        path.write_text(json.dumps(record), encoding="utf-8")


def _refusal(target: Path, path: Path) -> UserError:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(1000))
        holder = f"{found['doing']}, process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "without a record"
    return UserError(f"{target} is being written by another command ({holder}): wait for it, or stop it first.")
