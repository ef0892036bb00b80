"""Shards that lie elsewhere: copied here one by one as they are needed, the longest unused removed first."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from repa.base import files
from repa.base.errors import UserError
from repa.base.faults import is_of_disk
from repa.data.cache import FileCache

CHUNK = 1 << 20


class Fetcher:
    """A folder of copies, shared by processes, that keeps at most `limit` bytes besides the newest file."""

    def __init__(self, limit: int):
        self.cache = FileCache(files.cache_folder() / "sources" / "shards", limit)

    def local(self, url: str) -> Path:
        """The copy of a URL or of the output of `pipe:COMMAND`, made now if it is not there.

        Raises:
            UserError: the URL cannot be read, or the command fails.
        """
        key = hashlib.sha256(url.encode()).hexdigest()
        return self.cache.path(key, "shard", lambda temporary: _fetch(url, temporary))


def _fetch(url: str, path: Path) -> None:
    if url.startswith("pipe:"):
        return _run(url.removeprefix("pipe:"), path)
    import fsspec

    try:
        with fsspec.open(url, "rb") as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
    except ImportError as error:
        raise UserError(f"{url} needs a package that is not installed: {error}.") from error
    except Exception as error:  # every kind of store has errors of its own, many of which are no OSError
        if is_of_disk(error) or (isinstance(error, OSError) and error.filename == str(path)):
            raise  # the disk here, which atomic_path explains
        raise UserError(f"{url} cannot be fetched: {type(error).__name__}: {error}.") from error
    return None


def _run(command: str, path: Path) -> None:
    """The output of a shell command, as WebDataset has it; its messages are shown when it fails."""
    with open(path, "wb") as target, tempfile.TemporaryFile() as messages:
        code = subprocess.run(command, shell=True, stdin=subprocess.DEVNULL, stdout=target, stderr=messages).returncode
        messages.seek(0)
        last = messages.read()[-300:].decode(errors="replace").strip().replace("\n", " ")
    if code:
        raise UserError(f"The command {command!r} failed with code {code}{f' ({last})' if last else ''}: mend it.")
