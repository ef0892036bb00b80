"""Remote files: downloaded on demand into a cache of bounded size on the local disk.

Cached shards of prepared data are named by their checksum, so they are valid for any data set and process. All
processes of a machine share the cache.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from repa.base import files, lock
from repa.base.errors import UserError
from repa.base.faults import is_of_disk
from repa.base.launch import positive_number
from repa.data.manifest import MANIFEST, Manifest
from repa.data.records import StoredFile

Result = TypeVar("Result")

LIMIT_VARIABLE = "REPA_STREAM_GB"  # environment variable: size of the cache in units of 10^9 bytes
FETCHERS = 4  # threads: one connection to an object store is slower than the network
PAUSES = (1.0, 4.0)  # seconds before a retry: stores occasionally refuse a request


def is_url(path: str | Path) -> bool:
    """Whether this is a URL for fsspec and not a local path."""
    return "://" in str(path)


class FileCache:
    """A cache of files FOLDER/KEY/NAME, where KEY is a hexadecimal checksum; evicts the least recently used.

    An open copy stays readable after another process removes it.

    Args:
        folder: the cache folder.
        limit: bytes that stay, besides the newest file.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit

    def path(self, key: str, name: str, fetch: Callable[[Path], None], size: int | None = None) -> Path:
        """The copy; `fetch` makes it if it is missing or has another size. Other processes wait for it."""
        path = self.folder / key / name
        # one thread of one process at a time for all keys with the same first digits: a lock for each key would leave a
        # lock file for every shard ever read
        with lock.held(self.folder / "locks" / key[:2]):
            # marks the file as used: most disks are mounted without access times. An eviction under another lock
            # may remove it between these lines; then it is fetched again
            with contextlib.suppress(FileNotFoundError):
                if size in (None, path.stat().st_size):
                    os.utime(path)
                    return path
            files.remove_leftovers(path.parent, name.__eq__)  # from a killed process: the lock is ours
            with files.atomic_path(path) as temporary:
                fetch(temporary)
                os.utime(temporary)
            self._evict(keep=path)
        return path

    def _evict(self, keep: Path) -> None:
        copies = []
        for path in self.folder.glob("[0-9a-f]*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process evicts at the same time
                if not path.name.startswith("."):  # these are being downloaded
                    status = path.stat()
                    copies.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


class RemoteFiles:
    """The files of a data set under a URL.

    Raises:
        UserError: an invalid cache size.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.limit = 1e9 * positive_number(LIMIT_VARIABLE, 100.0, "it is the size of the cache in GB, such as 200")
        self.folder = files.cache_folder() / "streams"
        self.cache = FileCache(self.folder, self.limit)

    def manifest(self) -> Manifest:
        """Download and check the manifest at every call, because the cache cannot tell whether it has changed."""
        data = _from_store(f"{self.url}/{MANIFEST}", lambda store, place: store.cat_file(place))
        folder = self.folder / "manifests" / hashlib.sha256(data).hexdigest()
        files.write_bytes(folder / MANIFEST, data)
        try:
            return Manifest.open(folder)
        except UserError as error:  # the error names the cached copy, which the user does not know
            raise UserError(str(error).replace(str(folder), self.url)) from error

    def path(self, record: StoredFile) -> Path:
        """The local copy of a file; a new copy is compared with its checksum. Thread-safe."""
        # the checksum becomes a folder name: an untrusted manifest must not name a folder outside the cache
        if not re.fullmatch("[0-9a-f]{64}", record.sha256):
            raise UserError(
                f"The manifest of {self.url} is damaged: the checksum of {record.file} is {record.sha256!r}."
            )

        def fetch(temporary: Path) -> None:
            _from_store(f"{self.url}/{record.file}", lambda store, place: store.get_file(place, str(temporary)))
            if files.sha256(temporary) != record.sha256:
                raise UserError(f"{self.url}/{record.file} does not match the checksum in its manifest. Copy it again.")

        return self.cache.path(record.sha256, record.file, fetch, record.size)

    def require_room(self, num_bytes: int) -> None:
        """Raises UserError if the cache is too small for this many bytes."""
        if num_bytes > self.limit:
            raise UserError(
                f"Streaming {self.url} needs {num_bytes / 1e9:.1f} GB of cache, but {LIMIT_VARIABLE} allows "
                f"{self.limit / 1e9:.1f}: raise it, or prepare the data with a smaller --shard-size."
            )


class FetchAhead:
    """Threads that download files before they are read. Close it to stop them."""

    def __init__(self, stream: RemoteFiles):
        self.stream = stream
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="ahead-fetch")
        self._asked: set[str] = set()

    def want(self, records: Iterable[StoredFile]) -> None:
        """Download these files in this order, except those of the previous call."""
        wanted = {record.sha256: record for record in records}
        for checksum, record in wanted.items():
            if checksum not in self._asked:
                # the result is dropped: the reader of the file asks again and gets the error, if any
                self._pool.submit(self.stream.path, record)
        self._asked = set(wanted)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def fetch_shard(url: str, limit: int) -> Path:
    """The local copy of a source's shard at a URL, or of the output of `pipe:COMMAND`; downloaded if missing.

    Args:
        limit: bytes of such copies that stay, besides the newest one.

    Raises:
        UserError: the URL cannot be read, or the command fails.
    """
    cache = FileCache(files.cache_folder() / "sources" / "shards", limit)
    key = hashlib.sha256(url.encode()).hexdigest()
    command = url.removeprefix("pipe:")

    def fetch(path: Path) -> None:
        if command == url:
            _from_store(url, lambda store, place: store.get_file(place, str(path)))
        else:
            _run(command, path)

    return cache.path(key, "shard", fetch)


def _from_store(url: str, action: Callable[[Any, str], Result]) -> Result:
    """The result of an action with fsspec's file system and path; retried after a pause."""
    import fsspec

    try:
        store, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}.") from error
    for pause in (*PAUSES, None):
        try:
            return action(store, place)
        except FileNotFoundError:
            raise UserError(f"{url} does not exist: check the URL, and that all files were copied.") from None
        except Exception as error:  # every store raises its own exceptions
            if is_of_disk(error):
                raise  # an error of the local disk, which atomic_path explains
            if pause is None:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{url} cannot be read: {reason}.") from error
            time.sleep(pause)
    raise AssertionError


def _run(command: str, path: Path) -> None:
    """The output of a shell command, as in the library webdataset; the error shows its messages."""
    # a file, because an unread pipe blocks a command after 64 KiB of messages
    with open(path, "wb") as target, tempfile.TemporaryFile() as messages:
        code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=target, stderr=messages).returncode
        messages.seek(0)
        last = messages.read()[-300:].decode(errors="replace").strip().replace("\n", " ")
    if code:
        raise UserError(
            f"The command {command!r} failed with code {code}{f' ({last})' if last else ''}: correct the command."
        )
