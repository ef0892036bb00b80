"""Shards on an object store, fetched when they are needed into a cache of bounded size on the local disk.

Cached files are named by their checksum: one that is there is right, whichever data set or process asks for it. Processes on one
machine share them.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repa.base import files
from repa.base.errors import UserError
from repa.base.faults import is_of_disk
from repa.data.cache import FileCache
from repa.data.manifest import MANIFEST, ArrayFile, Manifest, TextFile

LIMIT = "REPA_STREAM_GB"  # environment variable: size of the cache in units of 10^9 bytes
DEFAULT_LIMIT = 100.0
FETCHERS = 4  # threads; one rarely fills the line to an object store
PAUSES = (1.0, 4.0)  # seconds before another try: stores refuse a request now and then


def is_url(path: str | Path) -> bool:
    """Whether it names a place that fsspec reaches, and no local path."""
    return "://" in str(path)


class Stream:
    """The files of a data set under a URL.

    Raises:
        UserError: no such protocol, its package is not installed, or a bad cache size.
    """

    def __init__(self, url: str):
        import fsspec

        self.url, self.limit = url, _limit()
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}.") from error
        self.folder = files.cache_folder() / "streams"
        self.cache = FileCache(self.folder, self.limit)

    def manifest(self) -> Manifest:
        """Read and check the manifest, anew at every call."""
        data = self._try(MANIFEST, lambda place: self.fs.cat_file(place))
        folder = self.folder / "manifests" / hashlib.sha256(data).hexdigest()
        files.write_bytes(folder / MANIFEST, data)
        return Manifest.open(folder)

    def path(self, record: ArrayFile | TextFile) -> Path:
        """Where a file lies here, fetched and compared with its checksum when it was not here yet. Thread-safe."""
        if not re.fullmatch("[0-9a-f]{64}", record.sha256):  # it becomes the name of a folder
            raise UserError(
                f"The manifest of {self.url} is damaged: the checksum of {record.file} is {record.sha256!r}."
            )

        def fetch(temporary: Path) -> None:
            self._try(record.file, lambda place: self.fs.get_file(place, str(temporary)))
            if files.sha256(temporary) != record.sha256:
                raise UserError(f"{self.url}/{record.file} has other bytes than its manifest says: copy it anew.")

        return self.cache.path(record.sha256, record.file, fetch, record.size)

    def require_room(self, num_bytes: int) -> None:
        """Raises UserError unless the cache may hold so much at once."""
        if num_bytes > self.limit:
            raise UserError(
                f"Streaming {self.url} needs {num_bytes / 1e9:.1f} GB of cache, but {LIMIT} allows {self.limit / 1e9:.1f}: "
                "raise it, or prepare the data with a smaller --shard-size."
            )

    def _try(self, name: str, action):
        """The result of an action on a file there, tried again after a pause when it fails."""
        place = f"{self.root.rstrip('/')}/{name}"
        for pause in (*PAUSES, None):
            try:
                return action(place)
            except FileNotFoundError:
                raise UserError(
                    f"There is no {self.url.rstrip('/')}/{name}: copy a whole folder of `repa prepare`."
                ) from None
            except Exception as error:  # every store has exceptions of its own
                if is_of_disk(error):
                    raise  # the disk here, which atomic_path explains
                if pause is None:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    raise UserError(f"{self.url.rstrip('/')}/{name} cannot be fetched: {reason}.") from error
                time.sleep(pause)
        raise AssertionError


class FetchAhead:
    """Threads that fetch files before they are read. Close it to stop them."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self._pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="ahead-fetch")
        self._asked: set[str] = set()

    def want(self, records: Iterable[ArrayFile]) -> None:
        """Fetch these, in this order, those that were asked for just before left out."""
        wanted = {record.sha256: record for record in records}
        for checksum, record in wanted.items():
            if checksum not in self._asked:
                self._pool.submit(self.stream.path, record)  # an error is met again, and raised, by who reads it
        self._asked = set(wanted)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _limit() -> float:
    text = os.environ.get(LIMIT, str(DEFAULT_LIMIT))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise UserError(
            f"The environment variable {LIMIT} is {text!r}: it is the size of the cache in GB, such as 200."
        )
    return limit * 1e9
