"""Parquet files with the bytes of images in a column, here or at a URL; read row group by row group."""

import functools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repa.base import extras, faults, files
from repa.base.errors import UserError
from repa.data.sources.names import counted_through, is_remote, named_by_first, require_one_split
from repa.data.sources.tables import TableSource, columns_of

MAX_GROUP = 1 << 31  # bytes of a row group, which is held in memory whole
KEPT = 2  # files, and groups of a column: rows are read in order, by threads that may be a group apart


class ParquetSource(TableSource):
    """Rows of parquet files in order. A URL (`hf://datasets/OWNER/NAME/data/train-{00..09}.parquet`) is streamed.

    Only the row groups that are asked for are read, never a whole file; the labels are read when it is opened.
    """

    _lock = threading.RLock()  # of the class, and so of each process

    def __init__(self, shards: Sequence[str], labels: str = "", **columns: str):
        """
        Args:
            shards: paths or URLs.
            labels: "" for a column of the file, or "none".
            columns: image, label, caption: the names of those columns.
        """
        self.shards = list(shards)
        require_one_split(self.shards)
        where = named_by_first(self.shards)
        schema = self._open(0).schema_arrow
        if twice := next((name for name in schema.names if schema.names.count(name) > 1), None):
            raise UserError(f"{self.shards[0]} has the column {twice!r} twice: rename one of them.")
        self._choose(where, columns_of(schema), labels, **columns)
        if not self._label and labels != "none" and len(self.shards) > 1 and not counted_through(self.shards):
            raise UserError(
                f"{self.shards[0]} and {self.shards[1]} have no column of labels, but names that are no count: if each is a class, add "
                "it as a column 'label', or give --labels none for one class."
            )
        groups = [self._groups(shard) for shard in range(len(self.shards))]
        self._rows = np.concatenate([[0], np.cumsum([rows for shard in groups for rows, _ in shard])])  # ends of groups
        self._group = [(number, group) for number, shard in enumerate(groups) for group in range(len(shard))]
        self._describe(
            where, int(self._rows[-1]), labels, lambda: [value for shard in range(len(groups)) for value in self._read_labels(shard)],
            json.dumps([size for shard in groups for size in shard]), is_local=not any(map(is_remote, self.shards)),
        )  # fmt: skip

    def name(self, index: int) -> str:
        group, row = self._find(index)
        shard = self._group[group][0]
        start = next(g for g in range(group, -1, -1) if g == 0 or self._group[g - 1][0] != shard)
        return f"{Path(self.shards[shard]).name}[{int(self._rows[group] - self._rows[start]) + row}]"

    def _find(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._rows, index, side="right")) - 1
        return group, int(index - self._rows[group])

    def _groups(self, shard: int) -> list[tuple[int, int]]:
        """Rows and bytes of the images of each row group."""
        opened = self._open(shard)
        if (names := columns_of(opened.schema_arrow)) != columns_of(self._open(0).schema_arrow):
            raise UserError(
                f"{self.shards[shard]} has other columns ({', '.join(names)}) than {self.shards[0]}: give files of one table."
            )
        return [self._measure(shard, opened.metadata.row_group(g)) for g in range(opened.metadata.num_row_groups)]

    def _measure(self, shard: int, group: Any) -> tuple[int, int]:
        columns = [group.column(i) for i in range(group.num_columns)]
        images = [c for c in columns if c.path_in_schema.split(".")[0] == self._image]
        size = sum(column.total_uncompressed_size for column in images)
        if size > MAX_GROUP:
            raise UserError(
                f"{self.shards[shard]} has a row group of {files.size(size)}, more than {files.size(MAX_GROUP)}: "
                "write it again with fewer rows in a row group."
            )
        return group.num_rows, size

    def _read_labels(self, shard: int) -> list[Any]:
        with faults.reading(self.shards[shard], "a parquet file"):
            return self._open(shard).read(columns=[self._label], use_threads=False)[0].to_pylist()

    def _cell(self, column: str, index: int) -> Any:
        group, row = self._find(index)
        # one thread reads, as the others want the same group; and a file of pyarrow has one position for all of them
        with self._lock:
            return self._column(column)(group)[row].as_py()

    def _read_group(self, column: str, group: int) -> Any:
        shard, number = self._group[group]
        # threads of pyarrow do not survive a fork: in a worker the read would wait for them without end
        with faults.reading(self.shards[shard], "a parquet file"):
            return self._open(shard).read_row_group(number, columns=[column], use_threads=False).column(0)

    def _open(self, shard: int) -> Any:
        """A file, opened in each process, so that no other process moves its position."""
        return self._opened(shard, os.getpid())

    @functools.cached_property
    def _opened(self) -> Callable[[int, int], Any]:
        return functools.lru_cache(KEPT)(lambda shard, process: _open(self.shards[shard]))

    @functools.cached_property
    def _column(self) -> Callable[[str], Callable[[int], Any]]:
        """Column -> what reads a group of it, and keeps some."""
        return functools.cache(lambda name: functools.lru_cache(KEPT)(functools.partial(self._read_group, name)))


def _open(where: str) -> Any:
    parquet = extras.need("pyarrow.parquet", f"The file {where}")
    with faults.reading(where, "a parquet file", damaged=(Exception,)):  # each store raises other exceptions
        if not is_remote(where):
            return parquet.ParquetFile(where, memory_map=True)  # pages are shared by the workers
        import fsspec

        return parquet.ParquetFile(fsspec.open(where, "rb").open())
