"""Reading of a prepared folder by position: its fields as one array each, its captions, and the captions' stored tokens.

Rows are read by position directly into the result: one copy from the page cache. A memory map would be as fast, but its
pages count as memory of this process, it reads far more than a row from a cold disk, and if a file is truncated while
it is read, it kills the process instead of raising an error.

Tokens of captions are in separate files of a shard, with one row per caption instead of per image: `text` (S, E),
`text_mask` (S,) and `text_scale` (S,). Row 0 is the empty text. `text_rows` has, for each image, the first row of its
captions and their number; an image without captions has the empty text. Mirrored copies share the captions of their
originals.
"""

import functools
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.base.arrays import npy_header
from repa.base.errors import UserError
from repa.conditions import Text
from repa.data.manifest import Manifest
from repa.data.packing import unpack
from repa.data.records import ArrayFile, Shard, TextFile, damaged

# a shuffled batch reads almost every file; with a lower limit, each batch would open and close files
MAX_OPEN = 60_000  # files, each with a descriptor
SPARE = 500  # descriptors for the rest of the process
HEADER = 4096  # bytes, enough for the header of any stored array
MAX_KEPT = 64  # shards whose captions stay in memory


class ShardReader:
    """Reads rows of any field by index in the data set. Thread-safe.

    Args:
        folder: the folder of the shards, or its name in errors if `fetch` is given.
        shards: its shards, in order; some may be empty.
        fetch: returns the local path of a remote file; None reads `folder`.
    """

    def __init__(
        self, folder: str | Path, shards: Sequence[Shard], fetch: Callable[[ArrayFile | TextFile], Path] | None = None
    ):
        self.folder, self.shards = folder, shards
        files = next((shard.files for shard in shards if shard.num), {})  # an empty shard has none
        self.fields = {field: (file.dtype, file.shape[1:]) for field, file in files.items()}
        nums = np.array([shard.num for shard in shards])
        self.ends = nums.cumsum()  # index in the data set of the end of each shard
        self.starts = self.ends - nums
        self.path = fetch or (lambda record: Path(folder, record.file))
        self._open = functools.lru_cache(_descriptors(len(shards) * len(self.fields)))(self._opened)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def gather(self, field: str, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows `indices` (n,) of a field, in that order and contiguous: (n, ...). Each shard is read in file order.

        Args:
            out: array of their shape and type for the result; None: a new array.

        Raises:
            UserError: no such field, or an unreadable file.
        """
        if field not in self.fields:
            raise UserError(
                f"The data in {self.folder} have no field {field!r}: choose from {', '.join(sorted(self.fields))}."
            )
        indices = self.checked(indices)
        dtype, shape = self.fields[field]
        if out is None:
            out = np.empty((len(indices), *shape), dtype)
        assert (out.shape, out.dtype) == ((len(indices), *shape), dtype), (out.shape, out.dtype)
        if out.size:
            self._fill(out.data.cast("B"), field, indices)
        return out

    def checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64; raises IndexError for numbers outside the data."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"{self.folder} has images 0 to {len(self) - 1}, but {indices.min()} to {indices.max()} were requested."
            )
        return indices

    def _fill(self, buffer: memoryview, field: str, indices: np.ndarray) -> None:
        """Read in the order of the files; rows that are adjacent in the file and in the result are one read."""
        # stable: a repeated image keeps the order of its places, and runs stay runs
        order = np.argsort(indices, kind="stable")
        rows = indices[order]
        shards = np.searchsorted(self.ends, rows, side="right")
        joined = (np.diff(rows) == 1) & (np.diff(order) == 1) & (np.diff(shards) == 0)
        first = np.concatenate(([0], np.flatnonzero(~joined) + 1))  # of each run
        nums = np.append(first[1:], len(rows)) - first
        size = len(buffer) // len(indices)
        numbers, which = np.unique(shards[first], return_inverse=True)
        # this list keeps files open until the last read: another thread may evict one from the cache, which closes it
        arrays = [self._open(shard, field) for shard in numbers.tolist()]
        starts = np.array([array.start for array in arrays]) - self.starts[numbers] * size
        positions, places = starts[which] + rows[first] * size, order[first] * size
        runs = zip(which.tolist(), positions.tolist(), places.tolist(), (places + nums * size).tolist(), strict=True)
        # preadv uses no shared file position and fills the result directly; names are looked up once, because the loop
        # below takes most of the loader's time
        preadv, handles = os.preadv, [array.handle for array in arrays]
        for array, position, begin, end in runs:
            if (num := preadv(handles[array], (buffer[begin:end],), position)) < end - begin:
                arrays[array].read_rest(buffer[begin:end], position, num)

    def batches(self, field: str, size: int) -> Iterator[np.ndarray]:
        """The field in order, in arrays (at most size, ...)."""
        for start in range(0, len(self), size):
            yield self.gather(field, np.arange(start, min(start + size, len(self))))

    def _opened(self, shard: int, field: str) -> "_OpenArray":
        record = self.shards[shard].files[field]
        return _OpenArray(self.path(record), record)


class _OpenArray:
    """An open .npy file. Readers keep a reference, so a file evicted from the cache is closed after its last read."""

    def __init__(self, path: Path, record: ArrayFile):
        self.path = path
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
            self.handle, start = self.file.fileno(), self.file.read(HEADER)
        except OSError as error:
            raise UserError(damaged(path, f"cannot be opened ({error.strerror})")) from error
        if start[:8] != np.lib.format.magic(1, 0):
            raise UserError(damaged(path, "is not an .npy file of version 1.0"))
        self.start = 10 + int.from_bytes(start[8:10], "little")
        # compared as text, because Python 3.11 cannot safely evaluate it in several threads (its issue 106905)
        wanted = npy_header(np.dtype(record.dtype), record.shape)[10:].strip().decode("latin1")
        header = start[10 : self.start].strip().decode("latin1")
        if header != wanted:
            raise UserError(damaged(path, f"holds {header}, not {wanted}"))

    def read_rest(self, buffer: memoryview, position: int, num: int) -> None:
        """Fill the rest of `buffer` after a read of `num` bytes at `position` of the file."""
        while num:  # Linux reads at most 2 GiB at a time, and 0 bytes at the end of the file
            buffer, position = buffer[num:], position + num
            if not buffer:
                return
            num = os.preadv(self.handle, (buffer,), position)
        raise UserError(damaged(self.path, "was truncated while it was read"))


def _descriptors(num: int) -> int:
    """How many of `num` files may stay open; raises the soft limit (usually 1024) as far as the hard limit allows."""
    wanted = min(num, MAX_OPEN)
    soft, hard = (sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted + SPARE:
        soft = min(wanted + SPARE, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(min(wanted, max(soft - SPARE, soft // 4)), 1)


class Captions:
    """Captions by the index of their image. Thread-safe."""

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self._kept = functools.lru_cache(MAX_KEPT)(self._lines)

    def gather(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]]:
        """The captions of images `indices` (n,), in that order; () for an image without any.

        Raises UserError when a file of captions cannot be read.
        """
        indices = self.reader.checked(indices)
        # shard by shard, because a caption file has lines of different lengths and is read from its start
        shards = np.searchsorted(self.reader.ends, indices, side="right")
        captions: list[tuple[str, ...]] = [()] * len(indices)
        for shard in np.unique(shards).tolist():
            if (record := self.reader.shards[shard].captions) is None:
                continue
            lines, path = self._kept(shard), Path(self.reader.folder, record.file)
            for place in np.flatnonzero(shards == shard).tolist():
                row = int(indices[place] - self.reader.starts[shard])
                captions[place] = texts_of(lines[row], row, path)
        return captions

    def _lines(self, shard: int) -> list[bytes]:
        stored = self.reader.shards[shard]
        assert stored.captions is not None  # `gather` reads only such shards
        return lines_of(self.reader.path(stored.captions), stored.num)


def lines_of(path: Path, num: int) -> list[bytes]:
    """The lines of a caption file, one for each of `num` images."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(lines) != num:
        raise UserError(damaged(path, f"has captions of {len(lines):,} images, but its shard has {num:,} images"))
    return lines


def texts_of(line: bytes, row: int, path: Path) -> tuple[str, ...]:
    """The captions in a line; `row` and `path` are for errors. Raises UserError for a damaged line."""
    try:
        texts = json.loads(line)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it is not a list of texts")
    except (ValueError, RecursionError) as error:  # thousands of brackets exceed Python's recursion limit
        raise UserError(damaged(path, f"is damaged in line {row + 1} ({error})")) from None
    return tuple(map(files.well_formed, texts))


class StoredText(NamedTuple):
    """Tokens of n captions, as stored."""

    tokens: Tensor  # (n, S, E) float16 or int8
    scale: Tensor | None  # (n, S) float32, of int8
    mask: Tensor | None  # (n, S) uint8

    def to(self, move: Callable[[Tensor], Tensor]) -> "StoredText":
        return StoredText._make(None if tensor is None else move(tensor) for tensor in self)

    def unpacked(self) -> Text:
        """float32 tokens and their mask, on the device of the stored ones."""
        return Text(unpack(self.tokens, self.scale), None if self.mask is None else self.mask.bool())


class TextReader:
    """Tokens by image. Thread-safe.

    Args:
        folder, fetch: as for ShardReader.
        manifest: of data with stored text.
    """

    def __init__(
        self, folder: str | Path, manifest: Manifest, fetch: Callable[[ArrayFile | TextFile], Path] | None = None
    ):
        assert manifest.text is not None
        self.folder, self.facts, self.num_originals = folder, manifest.text, len(manifest.originals)
        # all files of a ShardReader have the same number of rows, so files by image and files by caption have separate
        # readers
        by_caption = [dict(shard.text) for shard in manifest.shards if shard.text]
        by_image = [files.pop("text_rows") for files in by_caption]
        self.places = ShardReader(folder, [Shard(num=f.shape[0], files={"text_rows": f}) for f in by_image], fetch)
        self.tokens = ShardReader(folder, [Shard(num=f["text"].shape[0], files=f) for f in by_caption], fetch)

    def gather(self, indices: Sequence[int] | np.ndarray, keys: Sequence[int] | None = None) -> StoredText:
        """The tokens of one caption per image of `indices` (n,): number key % (number of captions); without `keys` the
        first.

        Raises UserError when a file cannot be read, or names captions that are not there.
        """
        indices = np.asarray(indices, np.int64) % self.num_originals
        first, count = self.places.gather("text_rows", indices).T
        shards = np.searchsorted(self.places.ends, indices, side="right")
        nums = self.tokens.ends[shards] - self.tokens.starts[shards]
        # a damaged file must not give an image another's caption; written so that no sum overflows
        if (bad := (first < 0) | (count < 1) | (first > nums) | (count > nums - first)).any():
            raise UserError(
                f"{self.folder} is damaged: image {indices[bad][0]} has captions {first[bad][0]} to "
                f"{(first + count)[bad][0]} of {nums[bad][0]}. `repa check {self.folder} --full` lists changed files."
            )
        rows = self.tokens.starts[shards] + first
        if keys is not None:
            # in Python's integers, because keys may exceed int64
            rows += np.array([int(key) % int(num) for key, num in zip(keys, count, strict=True)], np.int64)
        return self._gather(rows)

    def empty(self) -> StoredText:
        """The tokens of the empty text, (1, S, E)."""
        return self._gather(np.zeros(1, np.int64))

    def _gather(self, rows: np.ndarray) -> StoredText:
        parts = {field: torch.from_numpy(self.tokens.gather(field, rows)) for field in self.tokens.fields}
        return StoredText(parts["text"], parts.get("text_scale"), parts.get("text_mask"))
