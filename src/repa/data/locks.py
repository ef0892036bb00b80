"""Locks between processes that die with their holder, so that no claim is ever stale."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system; then only the shares keep processes apart


def take(path: Path, *, wait: bool = False) -> int | None:
    """Lock a file for this process; returns its descriptor, which `release` wants, or None when another process has it.

    POSIX record locks: they hold between machines over NFS, end with the process however it ends, and are not inherited
    by its children. A process does not lock itself out.
    """
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return handle
        os.close(handle)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return None
        raise
    return handle


def release(handle: int) -> None:
    """Give a lock back."""
    os.close(handle)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock and hold it in the block."""
    handle = take(path, wait=True)
    try:
        yield
    finally:
        release(handle)
