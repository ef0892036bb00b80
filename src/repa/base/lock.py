"""Locks on outputs: the system releases them when their process ends, and errors name the holder."""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from repa.base import files
from repa.base.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without locks
TAKEN = (errno.EAGAIN, errno.EACCES)  # errors for a lock of another process
TRIES = 20  # attempts to share a lock, within a second

_handles: set[int] = set()  # of the locked files


def take(path: Path, *, wait: bool = False, is_shared: bool = False) -> int | None:
    """Lock a file; None if another process has it. `release` or the end of the process frees it.

    Args:
        path: the file; created if it is missing.
        wait: wait until it is free.
        is_shared: others may share it too. Tried for a second, because a leaving process locks it alone briefly.
    """
    import fcntl  # missing on Windows, where the rest of the package can be imported

    mode = (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    attempt = 0
    while True:
        attempt += 1
        path.parent.mkdir(parents=True, exist_ok=True)  # the last holder may have removed it
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        _handles.add(handle)  # now, because another thread may fork while this one waits
        try:
            fcntl.flock(handle, mode)
            # The last holder may have removed the file after it was opened: a lock on an unnamed file would exclude nobody.
            if os.fstat(handle).st_nlink:
                return handle
            release(handle)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"The file system of {path.parent} has no locks: make sure that no other command writes there.",
                    stacklevel=2,
                )
                return handle
            release(handle)
            if error.errno == errno.ESTALE:  # removed on another machine
                continue
            if error.errno not in TAKEN:
                raise
            if not is_shared or attempt == TRIES:
                return None
            time.sleep(1 / TRIES)


def release(handle: int) -> None:
    """Free a lock. A forked process frees none: its copies are closed, and their numbers may belong to other files."""
    import fcntl

    if handle in _handles:
        _handles.remove(handle)
        # A process that was just forked may still have a copy, which closing this one would leave locked.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _close_inherited() -> None:
    """A forked process would keep the locks of its parent after the parent's end."""
    while _handles:
        os.close(_handles.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock and hold it in the block."""
    handle = take(path, wait=True)
    assert handle is not None  # because wait=True blocks
    try:
        yield
    finally:
        release(handle)


def lock_of(target: Path) -> Path:
    """The path of the lock of a file or folder: beside it, or inside a folder whose parent cannot be written.

    Links are resolved, so that two names of one folder share a lock.
    """
    target = Path(os.path.realpath(target))
    inside = target.is_dir() and not os.access(target.parent, os.W_OK)
    return target / ".lock" if inside else target.parent / f".{target.name}.lock"


@contextlib.contextmanager
def exclusive(target: Path, doing: str, *, is_shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder that the block writes; the lock is removed afterwards.

    Args:
        target: what is written.
        doing: the command that others see: "repa train".
        is_shared: see `shared`.

    Raises:
        UserError: another process holds the lock; the message names it, its host and its start time.
    """
    import fcntl

    path = lock_of(target)
    files.require_place(path.parent, target)
    if (handle := take(path, is_shared=is_shared)) is None:
        raise _refusal(target, path)
    try:
        if not is_shared:
            place = Path(os.path.abspath(target))  # "." has no name
            files.remove_leftovers(place.parent, place.name.__eq__)  # from a killed writer
        _sign(handle, doing)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if is_shared:  # The last process removes the file: locking it alone fails while others share it.
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Removed while held: a waiting process finds that the file is no longer the one of this name, and tries again.
                if handle in _handles:  # not in a forked process
                    path.unlink()
    finally:
        release(handle)


def shared(target: Path, doing: str) -> AbstractContextManager[None]:
    """Like `exclusive`, but any number of processes may hold it together; the processes of `exclusive` are excluded."""
    return exclusive(target, doing, is_shared=True)


def _sign(handle: int, doing: str) -> None:
    """Write who holds the lock, for others; it holds without this too, as on a full disk."""
    record = {"doing": doing, "host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
    with contextlib.suppress(OSError):
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(record).encode(), 0)


def _refusal(target: Path, path: Path) -> UserError:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.loads(file.read(1000))
        holder = f"{found['doing']}, process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "without a record"
    return UserError(f"{target} is being written by another command ({holder}): wait for it, or stop it first.")
