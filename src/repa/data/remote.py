"""Remote files: fetched when they are needed, into a cache of bounded size on the local disk.

Cached shards of prepared data are named by their checksum: one that is there is right, whichever data set or process asks for it.
Processes on one machine share the cache.
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
FETCHERS = 4  # threads; an object store sends to one connection more slowly than the network could
PAUSES = (1.0, 4.0)  # seconds before another try: stores refuse a request now and then


def is_url(path: str | Path) -> bool:
    """Whether it is a URL, which fsspec reads, and no local path."""
    return "://" in str(path)


class FileCache:
    """FOLDER/KEY/NAME, where KEY is a checksum in hexadecimal digits. What was used longest ago is removed first.

    A copy that is open while another process removes it can be read until it is closed.

    Args:
        folder: where to.
        limit: bytes that stay, besides the newest file.
    """

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit

    def path(self, key: str, name: str, fetch: Callable[[Path], None], size: int | None = None) -> Path:
        """The copy, made by `fetch` when it is not there or not of `size` bytes. Other processes that want it wait."""
        path = self.folder / key / name
        # one thread of one process at a time, for this key and those few that begin with the same digits: a lock for each
        # key would leave a file for every shard that was ever read
        with lock.held(self.folder / "locks" / key[:2]):
            # used now, so evicted last: most disks are mounted without times of access. An eviction for a key under another
            # lock may remove the file between these lines, and then it is fetched again
            with contextlib.suppress(FileNotFoundError):
                if size in (None, path.stat().st_size):
                    os.utime(path)
                    return path
            files.remove_leftovers(path.parent, name.__eq__)  # of a process that was killed: the lock is ours
            with files.atomic_path(path) as temporary:
                fetch(temporary)
                os.utime(temporary)
            self._evict(keep=path)
        return path

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


class RemoteFiles:
    """The files of a data set under a URL.

    Raises:
        UserError: a bad cache size.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.limit = 1e9 * positive_number(LIMIT_VARIABLE, 100.0, "it is the size of the cache in GB, such as 200")
        self.folder = files.cache_folder() / "streams"
        self.cache = FileCache(self.folder, self.limit)

    def manifest(self) -> Manifest:
        """Fetch and check the manifest, at every call: nothing in the cache tells whether it has changed."""
        data = _from_store(f"{self.url}/{MANIFEST}", lambda store, place: store.cat_file(place))
        folder = self.folder / "manifests" / hashlib.sha256(data).hexdigest()
        files.write_bytes(folder / MANIFEST, data)
        try:
            return Manifest.open(folder)
        except UserError as error:  # it names the copy, of which the user knows nothing
            raise UserError(str(error).replace(str(folder), self.url)) from error

    def path(self, record: StoredFile) -> Path:
        """The local copy of a file; one that is fetched now is compared with its checksum. Thread-safe."""
        # it becomes the name of a folder, and whoever made the manifest must not choose one outside of the cache
        if not re.fullmatch("[0-9a-f]{64}", record.sha256):
            raise UserError(
                f"The manifest of {self.url} is damaged: the checksum of {record.file} is {record.sha256!r}."
            )

        def fetch(temporary: Path) -> None:
            _from_store(f"{self.url}/{record.file}", lambda store, place: store.get_file(place, str(temporary)))
            if files.sha256(temporary) != record.sha256:
                raise UserError(f"{self.url}/{record.file} has other bytes than its manifest says. Copy it again.")

        return self.cache.path(record.sha256, record.file, fetch, record.size)

    def require_room(self, num_bytes: int) -> None:
        """Raises UserError unless the cache may hold so much at once."""
        if num_bytes > self.limit:
            raise UserError(
                f"Streaming {self.url} needs {num_bytes / 1e9:.1f} GB of cache, but {LIMIT_VARIABLE} allows {self.limit / 1e9:.1f}: "
                "raise it, or prepare the data with a smaller --shard-size."
            )


class FetchAhead:
    """Threads that fetch files before they are read. Close it to stop them."""

    def __init__(self, stream: RemoteFiles):
        self.stream = stream
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="ahead-fetch")
        self._asked: set[str] = set()

    def want(self, records: Iterable[StoredFile]) -> None:
        """Fetch these files, in this order, but for those of the call before."""
        wanted = {record.sha256: record for record in records}
        for checksum, record in wanted.items():
            if checksum not in self._asked:
                # its result is dropped: whoever reads the file asks again, and meets the error if there was one
                self._pool.submit(self.stream.path, record)
        self._asked = set(wanted)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def fetch_shard(url: str, limit: int) -> Path:
    """The copy of a shard of a source at a URL, or of the output of `pipe:COMMAND`; made now if it is not there.

    Args:
        limit: bytes of all such copies that stay, besides the newest one.

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
    """The result of an action on a file of a store, given fsspec's file system and the place there; tried again after a pause."""
    import fsspec

    try:
        store, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be opened: {error}.") from error
    for pause in (*PAUSES, None):
        try:
            return action(store, place)
        except FileNotFoundError:
            raise UserError(f"There is no {url}: check the address, and that everything was copied.") from None
        except Exception as error:  # each store raises other exceptions
            if is_of_disk(error):
                raise  # the disk here, which atomic_path explains
            if pause is None:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{url} cannot be fetched: {reason}.") from error
            time.sleep(pause)
    raise AssertionError


def _run(command: str, path: Path) -> None:
    """The output of a shell command, as in the library webdataset; its messages are shown when it fails."""
    # a file, because a pipe that nobody reads stops a command after 64 KiB of messages
    with open(path, "wb") as target, tempfile.TemporaryFile() as messages:
        code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=target, stderr=messages).returncode
        messages.seek(0)
        last = messages.read()[-300:].decode(errors="replace").strip().replace("\n", " ")
    if code:
        raise UserError(f"The command {command!r} failed with code {code}{f' ({last})' if last else ''}: correct it.")
