"""The texts that came with the images."""

import functools
import json
from collections.abc import Sequence

import numpy as np

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
            lines = self._kept(shard)
            for place in np.flatnonzero(shards == shard).tolist():
                row = int(indices[place] - self.reader.starts[shard])
                try:
                    found[place] = tuple(json.loads(lines[row]))
                except (ValueError, TypeError, RecursionError) as error:
                    raise UserError(
                        f"Line {row + 1} of {record.file} in {self.reader.folder} is damaged ({error}): delete the file "
                        "and run the same `repa prepare` again, which makes it anew."
                    ) from None
        return found

    def _lines(self, shard: int) -> list[bytes]:
        planned = self.reader.manifest.shards[shard]
        path = self.reader.path(planned.captions)
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        if len(lines) != planned.num:
            raise UserError(
                f"{path} holds the captions of {len(lines):,} images, but its shard has {planned.num:,}: delete it and run "
                "the same `repa prepare` again, which makes it anew."
            )
        return lines
