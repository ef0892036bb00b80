"""Long analyses: features collected once, in chunks on disk that a kill spares; work shared by processes and counted.

CACHE/1f3a.../               one folder for what the features are a function of, which identity.json says
  depth08-000000000-9f2c....npy   rows 0 to CHUNK - 1 of one field, float32 or float16, and their checksum
"""

import contextlib
import hashlib
import json
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

CHUNK = 512  # rows in a file: what a kill can cost
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
    """Have `make` give the fields of rows 0 to num - 1, chunk by chunk, where the cache lacks them; returns what reads a field.

    Several processes share the chunks and meet at the end. Without a cache (one process) the rows stay in memory.

    Raises:
        UserError: values that `store` cannot hold, no room on the disk, or a damaged file of the cache.
    """
    folder = None if cache is None else cache / _name({**identity, "num": num, "store": store})
    chunks = [range(start, min(start + CHUNK, num)) for start in range(0, num, CHUNK)]
    kept: dict[str, list[Tensor]] = {field: [] for field in fields}
    assert folder is not None or not dist.active(), "several processes need a folder to share"
    with _tidied(folder) if folder is not None and dist.is_main() else contextlib.nullcontext():
        if folder is not None and dist.is_main():
            files.write_json(folder / IDENTITY, {**identity, "num": num, "store": store})
        dist.barrier()  # nobody writes while it is tidied
        _fill(folder, chunks, fields, kept, make, store, num, progress)
        dist.barrier()
    if folder is None:
        return lambda field: torch.cat(kept[field])
    return lambda field: torch.from_numpy(np.concatenate([_read(folder, field, rows) for rows in chunks]))


def each(items: Sequence, rows_of: Callable[[Any], Rows]) -> Rows:
    """The rows of all items in their order on every process, the work shared."""
    mine = [(i, rows_of(item)) for i, item in enumerate(items) if i % dist.world() == dist.rank()]
    done = sorted((pair for part in dist.gather_objects(mine) for pair in part), key=lambda pair: pair[0])
    return [row for _, rows in done for row in rows]


def best(rows: Sequence[dict[str, Any]], value: str) -> Rows:
    """One row for each run, step, noise level, depth and kind of features: the highest, which is a probe's best learning rate."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("run", "step", "t", "depth", "features"))
        if key not in found or row[value] > found[key][value]:
            found[key] = row
    return list(found.values())


def share(num: int) -> int:
    """How many of `num` items `each` gives to this process."""
    return len(range(dist.rank(), num, dist.world()))


class Stages:
    """One count over several stages of known sizes."""

    def __init__(self, progress: Progress, sizes: Sequence[int]):
        self.progress, self.sizes, self.started = progress, sizes, 0

    def next(self) -> Progress:
        """Progress of the next stage."""
        before = sum(self.sizes[: self.started])
        self.started += 1
        return lambda done, _: self.progress(before + done, sum(self.sizes))


@contextlib.contextmanager
def _tidied(folder: Path) -> Iterator[None]:
    """Remove what killed processes left in a cache folder, unless another process fills it now, which is welcome to."""
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


def _fill(
    folder: Path | None, chunks: Sequence[range], fields: Sequence[str], kept: dict[str, list[Tensor]], make: Make, store: str,
    num: int, progress: Progress,
) -> None:  # fmt: skip
    """This process's chunks of what is missing."""
    for rows in chunks[dist.rank() :: dist.world()]:
        missing = [f for f in fields if folder is None or _found(folder, f, rows) is None]
        if missing:
            made = {field: _stored(x, field, store) for field, x in make(rows, missing).items()}
            if folder is not None and rows is chunks[0]:
                needed = sum(x.nbytes for x in made.values()) * -(-num // CHUNK)
                files.require_space(folder, needed, f"Keeping the features of {num:,} images")
            for field, x in made.items():
                assert len(x) == len(rows), (field, x.shape, rows)
                if folder is None:
                    kept[field].append(torch.from_numpy(x))
                else:
                    save_npy(folder / f"{_stem(field, rows)}-{_checksum(x)}.npy", x)
        progress(min(rows.stop + (dist.world() - 1) * CHUNK, num), num)


def _name(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _stem(field: str, rows: range) -> str:
    return f"{field}-{rows.start:09d}"


def _checksum(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).data).hexdigest()[:16]


def _found(folder: Path, field: str, rows: range) -> np.ndarray | None:
    """The rows that the cache holds; a file that is not what its name says is removed, and they are made again."""
    for path in folder.glob(f"{_stem(field, rows)}-*.npy"):
        try:
            array = load_npy(path, "features", "Remove it, and it is made again.")
        except UserError:
            array = np.empty(0)
        if array.ndim == 2 and len(array) == len(rows) and path.stem.rpartition("-")[2] == _checksum(array):
            return array
        path.unlink(missing_ok=True)
    return None


def _stored(x: Tensor, field: str, store: str) -> np.ndarray:
    x = x.detach().cpu().to(getattr(torch, store))
    if not torch.isfinite(x).all():
        remedy = "keep it with --store float32" if store == "float16" else "the network or its input is damaged"
        raise UserError(f"{field} has values that {store} cannot hold: {remedy}.")
    return x.contiguous().numpy()


def _read(folder: Path, field: str, rows: range) -> np.ndarray:
    if (array := _found(folder, field, rows)) is None:
        raise UserError(f"{folder} lost rows {rows.start} to {rows.stop - 1} of {field}: run the same command again.")
    return array
