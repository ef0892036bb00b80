"""One command at a time on what it writes: locks of files that die with their holder, and a sentence about who holds them."""

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

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system, on which commands are not kept apart
TRIES = 20  # to share a lock, in a second


def take(path: Path, *, wait: bool = False) -> BaseFileLock | None:
    """Lock a file; None when another process has it. `release` gives it back, and so does the end of the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Taken by one thread, given back by another; a soft lock, a file that is there or not, would outlive a killed holder.
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
    assert lock is not None  # it was waited for
    try:
        yield
    finally:
        release(lock)


def lock_of(target: Path) -> Path:
    """Where the lock of a file or folder is: next to it, or in a folder whose own place cannot be written.

    Of a link: where the lock of what it leads to lies, so that two names of a folder have one lock.
    """
    target = Path(os.path.realpath(target))
    inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target / ".lock" if inside else target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def alone(target: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a file or folder that the block writes; it vanishes afterwards.

    Args:
        target: what is written.
        doing: the command, for others: "repa train".

    Raises:
        UserError: another process holds it; the sentence says which, where and since when.
    """
    path = _usable_lock(target)
    if (lock := take(path)) is None:
        raise _refusal(target, path)
    if not lock.is_locked:
        warnings.warn(f"The file system of {target} has no locks: see that no other command writes it.", stacklevel=3)
    place = Path(os.path.abspath(target))  # "." has no name
    files.remove_leftovers(place.parent, place.name.__eq__)  # of a writer that was killed
    try:
        _sign(path, doing)
        yield
    finally:
        # Removed while it is held: whoever waits finds that the file is no longer the one of this name, and looks again.
        with contextlib.suppress(OSError):
            path.unlink()
        release(lock)


@contextlib.contextmanager
def shared(target: Path, doing: str) -> Iterator[None]:
    """Hold the lock of a folder together with others that share it, while nobody is `alone` there.

    It is the same file as `alone` locks, which filelock's ReadWriteLock, a SQLite database, could not be.

    Args:
        target: what is written.
        doing: the command, for others: "repa prepare".

    Raises:
        UserError: another process holds it alone; the sentence says which, where and since when.
    """
    import fcntl  # absent on Windows, where the rest of the package may be imported

    path = _usable_lock(target)
    if (handle := _share(path)) is None:
        raise _refusal(target, path)
    try:
        _sign(path, doing)
        yield
    finally:
        with contextlib.suppress(OSError):
            # The last one removes the file: to lock it alone fails while others share it.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(handle)


def _share(path: Path) -> int | None:
    """An open file with a shared lock; None when a process has it alone. Tried for a second: who leaves looks whether it is the last."""
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
        # Opened and then removed by the last holder: a lock on a file without a name would keep nobody out.
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
        holder = "which left no record"
    return UserError(f"{target} is being written by another command ({holder}): wait for it, or stop it first.")
