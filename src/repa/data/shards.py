"""Arrays on disk: one .npy file for each field and shard, written in one pass."""

import contextlib
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repa.base import files
from repa.base.arrays import load_npy
from repa.data.manifest import ArrayFile, TextFile


def plain_name(field: str) -> str:
    """'features.tiny:seed=1' -> 'features.tiny_seed_1': plain on every system."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in field)


def array_name(field: str, shard: int) -> str:
    """'features.tiny:seed=1', 3 -> 'features.tiny_seed_1-00003.npy'."""
    return f"{plain_name(field)}-{shard:05d}.npy"


def captions_name(shard: int) -> str:
    return f"captions-{shard:05d}.jsonl"


class ShardWriter:
    """Writes the fields of one shard side by side, batch after batch; each file appears when it is whole.

    Args:
        folder: where to.
        shard: its number.
        expected: how many images it will hold if none is left out; then the checksums cost no second reading.
    """

    def __init__(self, folder: Path, shard: int, expected: int = 0):
        self.folder, self.shard, self.expected = folder, shard, expected
        self._stack = contextlib.ExitStack()
        self._arrays: dict[str, _Array] = {}
        self._captions: list[str] = []
        self.num_bytes = 0

    def append(self, fields: dict[str, np.ndarray], captions: Sequence[tuple[str, ...]] = ()) -> None:
        """Add one batch: field -> array (n, ...), and the captions of each image if it has a field for them."""
        for field, rows in fields.items():
            if field not in self._arrays:
                path = self._stack.enter_context(files.atomic_path(self.folder / array_name(field, self.shard)))
                self._arrays[field] = self._stack.enter_context(contextlib.closing(_Array(path, rows, self.expected)))
            self._arrays[field].append(rows)
            self.num_bytes += rows.nbytes
        self._captions += [json.dumps(texts, ensure_ascii=False) + "\n" for texts in captions]

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

    def captions(self) -> TextFile | None:
        """Write the captions, after the end of the block; None when there are none."""
        if not self._captions:
            return None
        path = self.folder / captions_name(self.shard)
        data = "".join(self._captions).encode(errors="replace")
        files.write_bytes(path, data)
        return TextFile(file=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


class _Array:
    """An .npy file that grows; its length goes into the header when it closes.

    Plain writes: on a full disk they raise, where a memory map would crash the process.
    """

    def __init__(self, path: Path, like: np.ndarray, expected: int = 0):
        self.file = open(path, "wb")  # noqa: SIM115
        self.dtype, self.row = like.dtype, like.shape[1:]
        self.num, self.expected = 0, expected
        self._header(expected)
        self.start = self.file.tell()
        self.digest = hashlib.sha256(_header(self.dtype, (expected, *self.row)))

    def append(self, rows: np.ndarray) -> None:
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.row), (rows.dtype, rows.shape)
        data = np.ascontiguousarray(rows).data
        self.file.write(data)
        self.digest.update(data)
        self.num += len(rows)

    def close(self) -> None:
        try:
            self.file.seek(0)
            self._header(self.num)
            assert self.file.tell() == self.start  # NumPy leaves room for a longer first dimension
        finally:
            self.file.close()

    def _header(self, num: int) -> None:
        self.file.write(_header(self.dtype, (num, *self.row)))

    def record(self, path: Path) -> ArrayFile:
        return ArrayFile(
            file=path.name,
            dtype=str(self.dtype),
            shape=(self.num, *self.row),
            size=path.stat().st_size,
            sha256=self.digest.hexdigest() if self.num == self.expected else files.sha256(path),
        )


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def record_of(path: Path) -> ArrayFile:
    """The record of an array that lies there."""
    array = load_npy(path, "an array")
    return ArrayFile(
        file=path.name, dtype=str(array.dtype), shape=array.shape, size=path.stat().st_size, sha256=files.sha256(path)
    )
