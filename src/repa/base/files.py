"""Atomic writes, checksums, the cache folder, checks of disk space."""

import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from repa.base import faults
from repa.base.errors import UserError, listed, nearest

# names of files being written or removed; tempfile's letters
LEFTOVER = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")

SEAL = "sha256_of_the_rest"  # entry of a JSON file with the checksum of its other entries

FEW = 4  # largest number of folders to suggest
CLOSE = 0.6  # least similarity of a path to suggest
MOST_NAMES = 1_000  # names in a folder that a mistyped one is compared with
MOST_DIGITS = 40  # of a whole number in JSON
MOST_JSON = 2**28  # bytes: COCO's annotations have 92 MB, and parsing takes up to 24 times as much memory


def cache_folder() -> Path:
    """The folder for downloads and derived files: $REPA_CACHE, else $XDG_CACHE_HOME/repa, else ~/.cache/repa."""
    if own := os.environ.get("REPA_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # its specification ignores a relative path, which would write into the current folder
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "repa"


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it when the block succeeds, and is removed when it fails.

    The data is synced before the rename, so a kill at any moment leaves either the old file or the new one.
    """
    with _temporary_beside(Path(path), _empty_file) as temporary:
        yield temporary
        sync(temporary)
        _permit(temporary, 0o666)
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like atomic_path for a folder of files; an existing folder at `path` is a bug of the caller."""
    path = os.path.realpath(path)  # renaming replaces an empty folder, but not a link to one
    with _temporary_beside(Path(path), tempfile.mkdtemp) as temporary:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            if entry.is_dir():
                sync_folder(entry)
            else:
                sync(entry)
            _permit(entry, 0o777 if entry.is_dir() else 0o666)  # safetensors makes files that only their owner may read
        os.rename(temporary, path)


@contextlib.contextmanager
def _temporary_beside(path: Path, make: Callable[..., str]) -> Iterator[Path]:
    """A temporary file or folder from `make` beside `path`, which the block renames at its end; disk errors name `path`."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(make(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        yield temporary
        sync_folder(path.parent)
    except Exception as error:
        if user_error := faults.written(error, path):
            raise user_error from error
        raise
    finally:
        if temporary is not None:
            _discard(temporary)


def _empty_file(**place: Any) -> str:
    handle, name = tempfile.mkstemp(**place)
    os.close(handle)
    return name


def _discard(path: Path) -> None:
    """Remove a file or folder if possible: on a failing disk the earlier error is the one to report."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | Path, sign: str, what: str) -> Iterator[Path]:
    """atomic_folder for a command that must not overwrite; done if an equal command has finished before.

    Args:
        path: absent, empty, or the result of an equal command.
        sign: a file that every such folder has; without it the folders are not compared.
        what: its name in the error: "the export".

    Raises:
        UserError: the folder has other contents.
    """
    path = Path(path)
    refusal = UserError(f"{path} exists and is not empty: choose another folder for {what}.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        with atomic_folder(path) as temporary:
            yield temporary
        return
    if not (path / sign).is_file():
        raise refusal
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as temporary:
        yield Path(temporary)
        if _contents(Path(temporary)) != _contents(path):
            raise refusal


def _contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it, so that a kill leaves no part of it under its name."""
    try:
        hidden = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)
    except FileNotFoundError:  # another process was first
        return
    # A file that is open on a network drive or a missing permission is no reason to stop.
    except OSError as error:
        again = "the next checkpoint or the same command tries again"
        warnings.warn(f"{folder} could not be removed ({error.strerror}): {again}.", stacklevel=2)


def remove_leftovers(folder: Path, mine: Callable[[str], object] = lambda name: True) -> None:
    """Remove the temporary files in `folder` of `atomic_path` and `atomic_folder` in a killed process.

    `mine` selects the names that no other command may write now; incomplete files of other commands stay. Files that
    cannot be removed stay for the next time.
    """
    for leftover in folder.glob(".*.tmp"):
        match = LEFTOVER.fullmatch(leftover.name)
        if match and mine(match[1]):
            _discard(leftover)


def write_bytes(path: str | Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write text as UTF-8; invalid bytes of a path become \\udcff, from which JSON and YAML restore them."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | Path, value: Any) -> None:
    try:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError:  # read_json would refuse NaN
        raise UserError(
            f"{path} was not written: it has a number that is NaN or infinite. Check the settings and the inputs."
        ) from None
    write_text(path, text + "\n")


def write_sealed(path: str | Path, values: Mapping[str, Any]) -> None:
    """`write_json` of an object with a checksum, by which `read_json` detects any change."""
    write_json(path, {**values, SEAL: _seal_of(values)})


def _seal_of(values: Mapping[str, Any]) -> str:
    # Converted through JSON first, because tuples and numeric keys become lists and texts.
    return json_sha256(json.loads(json.dumps(values)))


def json_sha256(value: Any) -> str:
    """SHA-256 of a value as JSON, whose keys are sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as .csv with these columns, or with all keys of all rows; missing values are empty."""
    text = io.StringIO()
    named = list(columns) or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, named, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_json(path: str | Path, sealed: bool = False) -> Any:
    """The content of a JSON file, without the checksum of a sealed one.

    Args:
        path: the file.
        sealed: refuse a file without a checksum; for files that are never edited by hand.

    Raises:
        UserError: it is not JSON, has a duplicate key, NaN or Infinity (which JSON lacks), or does not match its
            checksum.
    """
    with faults.reading(path, "JSON", missing=f"There is no file {path}."):
        if (num_bytes := os.stat(path).st_size) > MOST_JSON:
            raise UserError(
                f"{path} is refused: it has {size(num_bytes)}, but a JSON file may have at most {size(MOST_JSON)}."
            )
        values = json.loads(
            Path(path).read_bytes(), object_pairs_hook=unique_keys, parse_int=_whole, parse_constant=_no_number
        )
    seal = values.pop(SEAL, None) if isinstance(values, dict) else None
    if sealed and seal is None:
        raise UserError(f"{path} is damaged: it lacks {SEAL!r}.")
    if seal is not None and seal != _seal_of(values):
        raise UserError(
            f"{path} does not match its checksum: restore it or make it again. If you edited it, remove its "
            f"line {SEAL!r}."
        )
    return values


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook of `json.loads` that refuses duplicate keys."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} appears twice")
        values[key] = value
    return values


def _whole(text: str) -> int:
    # int has no bound, but other types of numbers have: a conversion would raise errors later
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def read_object(path: str | Path, sealed: bool = False, /, **entries: type | tuple[type, ...]) -> dict[str, Any]:
    """Read an untrusted JSON file that must hold an object with these entries of these types."""
    values = read_json(path, sealed)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it must hold an object, but holds {type(values).__name__}.")
    for name, kind in entries.items():
        if name not in values:
            raise UserError(f"{path} is damaged: it lacks {name!r}.")
        if not isinstance(values[name], kind) or (isinstance(values[name], bool) and kind is int):
            raise UserError(f"{path} is damaged: its {name!r} has the wrong type {type(values[name]).__name__}.")
    return values


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which JSON and command lines can hold but UTF-8 files cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_at(file: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset` of an open file; raises EOFError when the file ends before."""
    # pread has no position that another thread or a forked process could move
    data = os.pread(file, size, offset)
    if len(data) < size:
        raise EOFError(f"the file ends {size - len(data):,} bytes too early")
    return data


def sha256(path: str | Path) -> str:
    faults.require_plain(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def near(path: Path, sign: str = "") -> str:
    """' Did you mean ...?' for the folders inside `path` that hold a file `sign`, or for the closest name beside a missing
    path; otherwise ''."""
    if path.exists():
        inside = [found.parent for found in sorted(path.glob(f"*/{sign}"))] if sign else []
        more = [f"another of {len(inside)}"] if len(inside) > FEW else []
        return f" Did you mean {listed([*inside[:FEW], *more])}?" if inside else ""
    with contextlib.suppress(OSError), os.scandir(path.parent) as beside:  # a folder may be entered, but not listed
        return nearest(path.name, [other.name for other in itertools.islice(beside, MOST_NAMES)], CLOSE)
    return ""


def require_path(path: Path) -> None:
    if not path.exists():
        raise UserError(f"There is no file or folder {path}: check its spelling.{near(path)}")


def require_space(folder: str | Path, num_bytes: int, what: str) -> None:
    """Refuse before work starts if the disk has too little space."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise UserError(
            f"{what} needs {size(num_bytes)}, but {folder} has {size(free)} free: free some space or choose another folder."
        )


def require_place(folder: Path, what: str | Path) -> None:
    """Refuse before work starts if `what` could not be written: creates its folder, and tests it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{what} cannot be written: {faults.why_no_place(error, folder)}") from None


def require_writable(path: str | Path) -> None:
    """Refuse before work starts if this file could not be written."""
    path = Path(path)
    require_place(path.parent, path)
    if path.is_dir():
        raise UserError(f"{path} cannot be written: it is a folder. Choose another name.")


def require_replaceable(path: str | Path, keys: Collection[str] = (), beside: Collection[str] = ()) -> None:
    """Refuse before work starts if writing a result to `path` would destroy a file that is not an earlier result.

    Args:
        path: the result; a folder is left to the caller.
        keys: entries of the JSON object that an earlier result has; empty: any file may be replaced.
        beside: suffixes of the files that are written with it: only an earlier result explains that they exist.
    """
    path = Path(path)
    if path.is_file() and keys:
        with contextlib.suppress(UserError):
            values = read_json(path)
            if isinstance(values, dict) and values.keys() >= set(keys):
                return
        raise UserError(f"{path} exists and holds something else than earlier results: choose another name.")
    others = [] if path.exists() else [other for other in map(path.with_suffix, beside) if other.exists()]
    if others:
        raise UserError(f"{others[0]} exists and would be replaced: choose another name than {path}.")


def refuse_links(folder: Path) -> None:
    """Raises UserError before a command writes into a run or data in which a link leads to another folder.

    Writing would remove and replace files there, and the link may be a stranger's. The folder itself may be a link.
    """
    for path in _links(folder):
        if path.resolve().is_relative_to(folder.resolve()):  # such as wandb/latest-run
            continue
        raise UserError(
            f"{path} is a symbolic link to another folder, in which files would be replaced: remove the link, or "
            f"move the whole of {folder} to that disk and link it instead."
        )


def _links(folder: Path, levels: int = 2) -> Iterator[Path]:
    """Links to folders in a folder and its subfolders, without a system call for every file."""
    # another process may remove a subfolder meanwhile
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _links(Path(entry.path), levels - 1) if levels > 1 else ()
            elif entry.is_symlink() and entry.is_dir():
                yield Path(entry.path)


def size(num_bytes: float) -> str:
    """A number of bytes as text: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def sync_folder(folder: Path) -> None:
    """Make a rename durable, if the file system can (some network mounts cannot)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync(path: Path) -> None:
    """Sync a file, if the file system can."""
    with open(path, "rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


def _permit(path: Path, mode: int) -> None:
    """Set the usual permissions instead of a temporary file's; a file system without permissions (CIFS) keeps its own."""
    with contextlib.suppress(PermissionError):
        os.chmod(path, mode & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
