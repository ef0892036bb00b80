"""Captions and their stored tokens, by image.

Tokens are in separate files of a shard, with one row per caption instead of per image: `text` (S, E), `text_mask` (S,)
and `text_scale` (S,). Row 0 is the empty text. `text_rows` has, for each image, the first row of its captions and their
number; an image without captions has the empty text. Mirrored copies share the captions of their originals.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError
from repa.conditions import Text
from repa.data.manifest import Manifest
from repa.data.packing import unpack
from repa.data.reader import ShardReader
from repa.data.records import ArrayFile, Shard, TextFile, damaged

MAX_KEPT = 64  # shards whose lines stay in memory


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
        return StoredText._make(None if part is None else move(part) for part in self)

    def text(self) -> Text:
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
        stored = [dict(shard.text) for shard in manifest.shards if shard.text]
        rows = [files.pop("text_rows") for files in stored]
        self.rows = ShardReader(folder, [Shard(num=f.shape[0], files={"text_rows": f}) for f in rows], fetch)
        self.tokens = ShardReader(folder, [Shard(num=f["text"].shape[0], files=f) for f in stored], fetch)

    def gather(self, indices: Sequence[int] | np.ndarray, keys: Sequence[int] | None = None) -> StoredText:
        """The tokens of one caption per image of `indices` (n,): number key % (number of captions); without `keys` the
        first.

        Raises UserError when a file cannot be read, or names captions that are not there.
        """
        indices = np.asarray(indices, np.int64) % self.num_originals
        first, count = self.rows.gather("text_rows", indices).T
        shards = np.searchsorted(self.rows.ends, indices, side="right")
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
