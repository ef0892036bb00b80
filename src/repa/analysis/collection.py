"""Long analyses: features are computed once and cached on disk in chunks, which survive a kill; processes share the work.

CACHE/1f3a.../               one folder per identity of the features, stored in identity.json
  depth08-000000000-9f2c....npy   rows 0 to CHUNK - 1 of one field, float32 or float16, and their checksum
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, files, lock
from repa.base.arrays import load_npy, save_npy
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent

CHUNK = 512  # images per file: the most work that a kill can lose
IDENTITY = "identity.json"

Make = Callable[[range, Sequence[str]], dict[str, Tensor]]  # rows and fields -> field -> (n, D)
Load = Callable[[str], Tensor]  # field -> (N, D) on the CPU, in the stored type
Rows = list[dict[str, Any]]


def collect(
    cache: Path | None,
    identity: dict[str, Any],
    fields: Sequence[str],
    num: int,
    make: Make,
    *,
    store: str = "float32",
    progress: Progress = silent,
) -> Load:
    """Compute the fields of images 0 to num - 1 that the cache lacks, chunk by chunk with `make`; returns a function that reads a field.

    Several processes share the chunks and synchronise at the end. Without a cache (one process) the features stay in memory.

    Raises:
        UserError: values outside the range of `store`, a full disk, or a damaged cache file.
    """
    identity = {**identity, "num": num, "store": store}
    chunks = [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]
    if cache is None:
        assert not dist.active(), "several processes need a folder to share"
        parts = []
        for rows in chunks:
            parts.append(_as_stored(make(rows, fields), rows, store))
            progress(rows.stop, num)
        return lambda field: torch.from_numpy(np.concatenate([part[field] for part in parts]))
    folder = cache / files.json_sha256(identity)[:16]
    dist.on_main(lambda: files.require_place(cache, f"The cache {cache}"))
    with _without_leftovers(folder) if dist.is_main() else contextlib.nullcontext():
        if dist.is_main():
            files.write_json(folder / IDENTITY, identity)  # for people: the folder's name is a checksum
        dist.barrier()  # nobody writes while it is tidied
        for rows in chunks[dist.rank() :: dist.world()]:
            # Per field: a command with further depths computes only those.
            if missing := [field for field in fields if _read_chunk(folder, field, rows) is None]:
                made = _as_stored(make(rows, missing), rows, store)
                if rows is chunks[0]:  # the first chunk shows how wide the features are
                    needed = sum(x.nbytes for x in made.values()) * len(chunks)
                    files.require_space(folder, needed, f"Keeping the features of {num:,} images")
                for field, x in made.items():
                    save_npy(folder / f"{_chunk_name(field, rows)}-{_checksum(x)}.npy", x)
            # The other processes have about the same progress; asking them would synchronise at every chunk.
            progress(min(rows.stop + (dist.world() - 1) * CHUNK, num), num)
        dist.barrier()
    return lambda field: torch.from_numpy(np.concatenate([_require_chunk(folder, field, rows) for rows in chunks]))


def each(items: Sequence, rows_of: Callable[[Any], Rows]) -> Rows:
    """The rows of all items, in order, on every process; processes share the work."""
    # In turn, because neighbouring items cost the same: the blocks of one network, the features of one encoder.
    mine = [(i, rows_of(item)) for i, item in enumerate(items) if i % dist.world() == dist.rank()]
    done = sorted((pair for part in dist.gather_objects(mine) for pair in part), key=lambda pair: pair[0])
    return [row for _, rows in done for row in rows]


def best(rows: Sequence[dict[str, Any]], value: str) -> Rows:
    """The best row per run, step, noise level, depth and kind of features, over a probe's learning rates."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("run", "step", "t", "depth", "features"))
        if key not in found or row[value] > found[key][value]:
            found[key] = row
    return list(found.values())


def share(num: int) -> int:
    """Number of this process's items of `num` in `each`."""
    return len(range(dist.rank(), num, dist.world()))


class Stages:
    """A progress count over several stages of known sizes."""

    def __init__(self, progress: Progress, sizes: Sequence[int]):
        self.progress, self.sizes, self.started = progress, sizes, 0

    def next(self) -> Progress:
        """Progress of the next stage."""
        before = sum(self.sizes[: self.started])
        self.started += 1
        return lambda done, _: self.progress(before + done, sum(self.sizes))


@contextlib.contextmanager
def _without_leftovers(folder: Path) -> Iterator[None]:
    """Remove files of killed processes from a cache folder, unless another process is filling it."""
    # Not `lock.exclusive`, which refuses the second: two commands that fill one folder write the same bytes under the same names.
    path = folder / ".filling.lock"
    taken = lock.take(path)
    if taken is None:
        yield
        return
    files.remove_leftovers(folder)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release(taken)


def _chunk_name(field: str, rows: range) -> str:
    return f"{field}-{rows.start:09d}"


def _checksum(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()[:16]


def _read_chunk(folder: Path, field: str, rows: range) -> np.ndarray | None:
    """Cached rows; a file that does not match its name is removed, and its rows are computed again."""
    for path in folder.glob(f"{_chunk_name(field, rows)}-*.npy"):
        try:
            array = load_npy(path, "features", "Delete it; it will be computed again.")
        except UserError:
            array = np.empty(0)
        if array.ndim == 2 and len(array) == len(rows) and path.stem.rpartition("-")[2] == _checksum(array):
            return array
        path.unlink(missing_ok=True)
    return None


def _as_stored(made: dict[str, Tensor], rows: range, store: str) -> dict[str, np.ndarray]:
    """The fields of some images in the stored type."""
    found = {}
    for field, x in made.items():
        assert len(x) == len(rows), (field, x.shape, rows)
        x = x.detach().cpu().to(getattr(torch, store))
        if not torch.isfinite(x).all():
            remedy = "use --store float32" if store == "float16" else "check the weights and the images"
            raise UserError(f"{field} has values outside the range of {store}: {remedy}.")
        found[field] = x.contiguous().numpy()
    return found


def _require_chunk(folder: Path, field: str, rows: range) -> np.ndarray:
    if (array := _read_chunk(folder, field, rows)) is None:
        raise UserError(
            f"{folder} has lost {field} of images {rows.start} to {rows.stop - 1}: run the same command again."
        )
    return array
