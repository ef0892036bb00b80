"""The texts that came with the images."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from repa.base import files
from repa.base.errors import UserError
from repa.data.reader import ShardReader

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
            raise ValueError("it is no list of texts")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"Line {row + 1} of {path.name} in {path.parent} is damaged ({error}): delete the file "
            "and run the same `repa prepare` again, which makes it again."
        ) from None
    return tuple(map(files.well_formed, texts))
