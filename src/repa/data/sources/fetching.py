"""Shards that lie elsewhere: copied here one by one as they are needed, the longest unused removed first."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from repa.base import files
from repa.base.errors import UserError

CHUNK = 1 << 20


class Fetcher:
    """A folder of copies, shared by processes, that keeps at most `limit` bytes besides the newest file."""

    def __init__(self, limit: int):
        self.folder = files.cache_folder() / "sources" / "shards"
        self.limit = limit

    def local(self, url: str) -> Path:
        """The copy of a URL or of the output of `pipe:COMMAND`, made now if it is not there.

        A copy that is open while another process removes it stays readable until it is closed.

        Raises:
            UserError: the URL cannot be read, or the command fails.
        """
        path = self.folder / hashlib.sha256(url.encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.is_file():
                os.utime(path)  # used now: the last to be removed
                return path
            with files.atomic_path(path) as temporary:
                _fetch(url, temporary)
            self._remove_oldest(path)
            return path

    def _remove_oldest(self, newest: Path) -> None:
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if path != newest and not path.suffix and not path.name.startswith("."):
                    copies.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in copies) + newest.stat().st_size
        for _, size, path in sorted(copies):
            if total > self.limit:
                path.unlink(missing_ok=True)
                total -= size


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
        if isinstance(error, OSError) and error.filename == str(path):
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


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait instead of fetching the same shard."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
