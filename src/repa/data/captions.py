"""The texts that came with the images, and their stored tokens, by the image that a caption belongs to.

Tokens lie in separate files of a shard, with a row for each caption instead of each image: `text` (S, E), `text_mask` (S,) and
`text_scale` (S,). Row 0 is the empty text. `text_rows` has, for each image, the first row of its captions and their number;
one without captions has the empty text. Flipped copies of images have the captions of their originals.
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
from repa.data.stored_files import ArrayFile, Shard, TextFile

MAX_KEPT = 64  # shards whose lines stay in memory


class Captions:
    """Captions by the index of their image. Thread-safe."""

    def __init__(self, reader: ShardReader):
        self.reader = reader
        self._kept = functools.lru_cache(MAX_KEPT)(self._lines)

    def gather(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, ...]]:
        """Those of images `indices` (n,), in that order; () for an image without.

        Raises UserError when a file of captions cannot be read.
        """
        indices = self.reader.checked(indices)
        shards = np.searchsorted(self.reader.ends, indices, side="right")
        found: list[tuple[str, ...]] = [()] * len(indices)
        for shard in np.unique(shards).tolist():
            if (record := self.reader.manifest.shards[shard].captions) is None:
                continue
            lines, where = self._kept(shard), Path(self.reader.folder, record.file)
            for place in np.flatnonzero(shards == shard).tolist():
                row = int(indices[place] - self.reader.starts[shard])
                found[place] = texts_of(lines[row], row, where)
        return found

    def _lines(self, shard: int) -> list[bytes]:
        planned = self.reader.manifest.shards[shard]
        assert planned.captions is not None  # of data with captions
        return lines_of(self.reader.path(planned.captions), planned.num)


def lines_of(path: Path, num: int) -> list[bytes]:
    """The lines of a file of captions, one for each of `num` images."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if len(lines) != num:
        raise UserError(
            f"{path} holds the captions of {len(lines):,} images, but its shard has {num:,}: delete it and run "
            "the same `repa prepare` again, which makes it again."
        )
    return lines


def texts_of(line: bytes, row: int, path: Path) -> tuple[str, ...]:
    """The captions in a line; `row` and `path` are for messages."""
    try:
        texts = json.loads(line)
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it is not a list of texts")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Line {row + 1} of {path.name} in {path.parent} is damaged ({error}): delete the file "
            "and run the same `repa prepare` again, which makes it again."
        ) from None
    return tuple(map(files.well_formed, texts))


class StoredText(NamedTuple):
    """Tokens of n captions as they are stored."""

    tokens: Tensor  # (n, S, E) float16 or int8
    scale: Tensor | None  # (n, S) float32, of int8
    mask: Tensor | None  # (n, S) uint8

    def to(self, move: Callable[[Tensor], Tensor]) -> "StoredText":
        return StoredText._make(None if part is None else move(part) for part in self)

    def text(self) -> Text:
        """float32 tokens and their mask, where the stored ones are."""
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
        shards = [shard for shard in manifest.shards if shard.text]
        fields = manifest.text.fields
        of_captions = [field for field in fields if field != "text_rows"]
        self.rows = ShardReader(folder, _view(shards, ["text_rows"], fields), fetch)
        self.tokens = ShardReader(folder, _view(shards, of_captions, fields), fetch)

    def gather(self, indices: Sequence[int] | np.ndarray, keys: Sequence[int] | None = None) -> StoredText:
        """One caption each of the images `indices` (n,): number key modulo how many there are; the first without `keys`.

        Raises UserError when a file cannot be read, or names captions that are not there.
        """
        indices = np.asarray(indices, np.int64) % self.num_originals
        first, count = self.rows.gather("text_rows", indices).T
        shards = np.searchsorted(self.rows.ends, indices, side="right")
        nums = self.tokens.ends[shards] - self.tokens.starts[shards]
        if (bad := (first < 0) | (count < 1) | (first > nums) | (count > nums - first)).any():
            raise UserError(
                f"{self.folder} is damaged: image {indices[bad][0]} has captions {first[bad][0]} to {(first + count)[bad][0]} of "
                f"{nums[bad][0]}. `repa check {self.folder} --full` names the files that changed."
            )
        picks = np.array([int(key) % int(num) for key, num in zip(keys, count, strict=True)]) if keys is not None else 0
        return self._gather(self.tokens.starts[shards] + first + picks)

    def empty(self) -> StoredText:
        """The tokens of the empty text, (1, S, E)."""
        return self._gather(np.zeros(1, np.int64))

    def _gather(self, rows: np.ndarray) -> StoredText:
        parts = {field: torch.from_numpy(self.tokens.gather(field, rows)) for field in self.tokens.fields}
        return StoredText(parts["text"], parts.get("text_scale"), parts.get("text_mask"))


class _View(NamedTuple):
    """A manifest to a ShardReader, of files that have other rows than images."""

    shards: list[Shard]
    fields: dict[str, tuple[str, tuple[int, ...]]]
    records: list[ArrayFile]
    num_images: int


def _view(shards: Sequence[Shard], names: Sequence[str], fields: dict[str, tuple[str, tuple[int, ...]]]) -> _View:
    parts = [{name: shard.text[name] for name in names} for shard in shards]
    nums = [files[names[0]].shape[0] for files in parts]
    return _View(
        [Shard(num=num, files=files) for num, files in zip(nums, parts, strict=True)],
        {name: fields[name] for name in names},
        [file for files in parts for file in files.values()],
        sum(nums),
    )
