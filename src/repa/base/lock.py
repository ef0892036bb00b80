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

from repa.base import files
from repa.base.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of a file system, on which commands are not kept apart
TRIES = 20  # to share a lock, in a second


def take(path: Path, *, wait: bool = False, share: bool = False) -> int | None:
    """Lock a file, alone or together with others that share it: an open handle, or None when another process has it.

    `release` gives it back, and so does the end of the process, whatever ends it.
    """
    import fcntl  # absent on Windows, where the rest of the package may be imported

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, kind)
        except OSError as error:
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"The file system of {path} has no locks: see that no other command writes it.", stacklevel=2
                )
                return handle
            os.close(handle)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return None
            raise
        # Opened and then removed by the last holder: a lock on a file without a name would keep nobody out.
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def release(handle: int) -> None:
    import fcntl

    # Unlocked and not only closed: a process that was forked meanwhile has the same handle.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Wait for a lock and hold it in the block."""
    handle = take(path, wait=True)
    assert handle is not None  # it was waited for
    try:
        yield
    finally:
        release(handle)


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
    with _holding(target, doing):
        place = Path(os.path.abspath(target))  # "." has no name
        files.remove_leftovers(place.parent, place.name.__eq__)  # of a writer that was killed
        yield


def shared(target: Path, doing: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock of a folder together with others that share it, while nobody is `alone` there; see `alone`."""
    return _holding(target, doing, share=True)


@contextlib.contextmanager
def _holding(target: Path, doing: str, *, share: bool = False) -> Iterator[None]:
    path = lock_of(target)
    files.require_place(path.parent, target)
    handle = take(path, share=share)
    for _ in range(TRIES if share else 0):
        # Whoever leaves has it alone for a moment, see `_is_last`.
        if handle is None:
            time.sleep(1 / TRIES)
            handle = take(path, share=True)
    if handle is None:
        raise UserError(
            f"{target} is being written by another command ({_holder(path)}): wait for it, or stop it first."
        )
    try:
        # A record for others; the lock holds without it, on a full disk too.
        record = {"doing": doing, "host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%F %T")}
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(record), encoding="utf-8")
        yield
    finally:
        try:
            # Removed while it is held: whoever waits finds that the file has no name any more, and looks again.
            if _is_last(handle):
                path.unlink()
        except OSError:
            pass  # it stays, and keeps nobody out
        finally:
            release(handle)


def _is_last(handle: int) -> bool:
    """Whether nobody shares this lock, which the process then has alone."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in NO_LOCKS
    return True


def _holder(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            holder = json.loads(file.read(1000))
        return f"{holder['doing']}, process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which left no record"
