"""Copies of files that lie elsewhere, in a folder of bounded size that processes on a machine share."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from repa.base import files, lock


class FileCache:
    """FOLDER/KEY/NAME, where KEY is a checksum in hexadecimal digits. What was used longest ago is removed first.

    A copy that is open while another process removes it stays readable until it is closed.

    Args:
        folder: where to.
        limit: bytes that stay, besides the newest file.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit

    def path(self, key: str, name: str, fetch: Callable[[Path], None], size: int | None = None) -> Path:
        """The copy, made by `fetch` when it is not there (or not of `size` bytes). Others wait, instead of fetching it too."""
        path = self.folder / key / name
        with self._alone(key):
            if not path.is_file() or size not in (None, path.stat().st_size):
                for left in path.parent.glob(f".{name}.*.tmp"):  # by a process that was killed: the lock is ours
                    left.unlink()
                with files.atomic_path(path) as temporary:
                    fetch(temporary)
                self._evict(keep=path)
            os.utime(path)  # used now: evicted last
        return path

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """One thread of one process at a time, for this key and those few that begin with the same digits."""
        with lock.held(self.folder / "locks" / key[:2]):
            yield

    def _evict(self, keep: Path) -> None:
        found = []
        for path in self.folder.glob("[0-9a-f]*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts too
                if not path.name.startswith("."):  # those are being fetched
                    status = path.stat()
                    found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
