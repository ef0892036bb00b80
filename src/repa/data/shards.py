"""Arrays on disk: one .npy file for each field and shard, written in one pass, read through memory maps."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from repa.base import files
from repa.base.errors import UserError
from repa.data.manifest import ArrayFile, Manifest

MAX_OPEN = 500  # memory maps each hold a file descriptor, and processes commonly get 1024


def array_name(field: str, shard: int) -> str:
    """'features.tiny:seed=1', 3 -> 'features.tiny_seed_1-00003.npy': a plain file name on every system."""
    plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in field)
    return f"{plain}-{shard:05d}.npy"


class ShardWriter:
    """Writes the fields of one shard side by side, batch after batch; each file appears when it is whole."""

    def __init__(self, folder: Path, shard: int):
        self.folder, self.shard = folder, shard
        self._stack = contextlib.ExitStack()
        self._arrays: dict[str, _Array] = {}

    def append(self, fields: dict[str, np.ndarray]) -> None:
        """Add one batch: field -> array (n, ...)."""
        for field, rows in fields.items():
            if field not in self._arrays:
                path = self._stack.enter_context(files.atomic_path(self.folder / array_name(field, self.shard)))
                self._arrays[field] = self._stack.enter_context(contextlib.closing(_Array(path, rows)))
            self._arrays[field].append(rows)

    def __enter__(self) -> "ShardWriter":
        self._stack.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._stack.__exit__(*error)

    def records(self) -> dict[str, ArrayFile]:
        """What was written, after the end of the block."""
        return {
            field: array.record(self.folder / array_name(field, self.shard)) for field, array in self._arrays.items()
        }


class _Array:
    """An .npy file that grows; its length goes into the header when it closes.

    Plain writes: on a full disk they raise, where a memory map would crash the process.
    """

    def __init__(self, path: Path, like: np.ndarray):
        self.file = open(path, "wb")  # noqa: SIM115
        self.dtype, self.row = like.dtype, like.shape[1:]
        self.num = 0
        self._header()
        self.start = self.file.tell()

    def append(self, rows: np.ndarray) -> None:
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.row), (rows.dtype, rows.shape)
        self.file.write(np.ascontiguousarray(rows).data)
        self.num += len(rows)

    def close(self) -> None:
        try:
            self.file.seek(0)
            self._header()
            assert self.file.tell() == self.start  # NumPy leaves room for a longer first dimension
        finally:
            self.file.close()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.num, *self.row)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def record(self, path: Path) -> ArrayFile:
        return ArrayFile(
            file=path.name,
            dtype=str(self.dtype),
            shape=(self.num, *self.row),
            size=path.stat().st_size,
            sha256=files.sha256(path),
        )


class ShardReader:
    """All shards of a data set as one array for each field; sizes are checked on opening, bytes by `check`."""

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        nums = np.array([shard.num for shard in manifest.shards])
        self.ends = nums.cumsum()  # index in the data set of the end of each shard
        self.starts = self.ends - nums
        for shard in manifest.shards:
            for record in shard.files.values():
                if not record.intact(self.folder):
                    raise UserError(
                        _damaged(self.folder / record.file, "is missing or has another size than when it was written")
                    )
        self._open = functools.lru_cache(MAX_OPEN)(self._map)

    def __len__(self) -> int:
        return self.manifest.num_images

    def gather(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Rows `indices` (n,) of a field, in that order and contiguous: (n, ...). Each shard is read in file order."""
        if field not in self.manifest.fields:
            raise UserError(
                f"The data in {self.folder} has no field {field!r}: it holds {', '.join(sorted(self.manifest.fields))}."
            )
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"{self.folder} has images 0 to {len(self) - 1}, but {indices.min()} to {indices.max()} were asked for."
            )
        dtype, shape = self.manifest.fields[field]
        out = np.empty((len(indices), *shape), dtype)
        order = np.argsort(indices, kind="stable")
        shards = np.searchsorted(self.ends, indices[order], side="right")
        local = indices[order] - self.starts[shards]
        for place, shard, row in zip(order.tolist(), shards.tolist(), local.tolist(), strict=True):
            out[place] = self._open(shard, field)[row]  # one copy; indexing with an array would make two
        return out

    def batches(self, field: str, size: int) -> Iterator[np.ndarray]:
        """The whole field in order, (at most size, ...) at a time."""
        for start in range(0, len(self), size):
            yield self.gather(field, np.arange(start, min(start + size, len(self))))

    def check(self) -> None:
        """Compare every file's bytes with its checksum; raises UserError that names the first that changed."""
        for shard in self.manifest.shards:
            for record in shard.files.values():
                if files.sha256(self.folder / record.file) != record.sha256:
                    raise UserError(_damaged(self.folder / record.file, "has other bytes than when it was written"))

    def _map(self, shard: int, field: str) -> np.ndarray:
        record = self.manifest.shards[shard].files[field]
        path = self.folder / record.file
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(_damaged(path, f"cannot be opened ({error})")) from error
        if array.dtype != record.dtype or array.shape != record.shape:
            raise UserError(_damaged(path, f"holds {array.dtype} {array.shape}, not {record.dtype} {record.shape}"))
        return np.asarray(array)  # rows of a memmap object are slow to make


def _damaged(path: Path, what: str) -> str:
    return f"{path} {what}: delete it and run the same `repa prepare` again, which makes it anew."


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed."""
    for pattern in (".*.npy.*.tmp", ".*.json.*.tmp"):
        for path in folder.rglob(pattern):
            os.unlink(path)
