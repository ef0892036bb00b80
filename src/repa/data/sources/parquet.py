"""Parquet files with a column of encoded images, local or at a URL, read by row groups."""

import collections
import functools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repa.base import faults, files, imports
from repa.base.errors import UserError
from repa.data.sources.names import counted_through, is_remote, named_by_first, require_one_split
from repa.data.sources.tables import Column, TableSource, columns_of

MAX_GROUP = 1 << 31  # bytes of the images of a row group, all of which are kept in memory
KEPT = 2  # files, and row groups per column: rows are read in order, by threads that may be one group apart


class ParquetSource(TableSource):
    """Rows of parquet files in order. A URL (`hf://datasets/OWNER/NAME/data/train-{00..09}.parquet`) is streamed.

    Only the row groups of requested images are read; the labels are read when the source is opened.
    """

    _lock = threading.RLock()  # one per process: a class attribute is not pickled

    def __init__(self, shards: Sequence[str], labels: str = "", **columns: str):
        """
        Args:
            shards: paths or URLs.
            labels: "" for a column of the files, or "none".
            columns: image, label and caption, the names of these columns.
        """
        self.shards = list(shards)
        require_one_split(self.shards)
        where = named_by_first(self.shards)
        self._choose(where, self._columns_of(0), labels, **columns)
        if not self._label and labels != "none" and len(self.shards) > 1 and not counted_through(self.shards):
            raise UserError(
                f"{self.shards[0]} and {self.shards[1]} have no column of labels, and their names are not numbered "
                "parts: if each file is a class, add a column 'label'; or give --labels none for one class."
            )
        groups = [self._groups(shard) for shard in range(len(self.shards))]
        self._rows = np.concatenate([[0], np.cumsum([rows for shard in groups for rows, _ in shard])])  # starts; end
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
        """Number of rows, and unpacked bytes, of each row group."""
        if (names := self._columns_of(shard)) != self._columns_of(0):
            raise UserError(
                f"The columns of {self.shards[shard]} ({', '.join(names)}) differ from those of {self.shards[0]}: give "
                "the files of one table."
            )
        return [self._measure(shard, group) for group in range(self._open(shard).metadata.num_row_groups)]

    def _measure(self, shard: int, number: int) -> tuple[int, int]:
        with faults.reading(self.shards[shard], "a parquet file"):
            # Not the sizes of its columns: pyarrow ends the process if the description of one is damaged.
            group = self._open(shard).metadata.row_group(number)
            rows, size = group.num_rows, group.total_byte_size
        if size > MAX_GROUP:
            raise UserError(
                f"{self.shards[shard]} has a row group of {files.size(size)}, more than {files.size(MAX_GROUP)}: "
                "write the file again with fewer rows per row group."
            )
        return rows, size

    def _columns_of(self, shard: int) -> dict[str, Column]:
        where = self.shards[shard]
        with faults.reading(where, "a parquet file"):  # a name may be invalid UTF-8
            schema = self._open(shard).schema_arrow
            names = collections.Counter(schema.names)
        if twice := next((name for name, num in names.items() if num > 1), None):
            raise UserError(f"{where} has the column {twice!r} twice: rename one of them.")
        return columns_of(schema)

    def _read_labels(self, shard: int) -> list[Any]:
        with faults.reading(self.shards[shard], "a parquet file"):
            values = self._open(shard).read(columns=[self._label], use_threads=False)[0].to_pylist()
            _require_rows(len(values), sum(rows for rows, _ in self._groups(shard)))
        return values

    def _cell(self, column: str, index: int) -> Any:
        group, row = self._find(index)
        # one thread at a time: the others need the same group, and all threads share the position of a pyarrow file
        with self._lock:
            return self._column(column)(group)[row].as_py()

    def _read_group(self, column: str, group: int) -> Any:
        shard, number = self._group[group]
        # the threads of pyarrow do not survive a fork: in a worker the read would wait for them forever
        with faults.reading(self.shards[shard], "a parquet file"):
            cells = self._open(shard).read_row_group(number, columns=[column], use_threads=False).column(0)
            _require_rows(len(cells), int(self._rows[group + 1] - self._rows[group]))
        return cells

    def _open(self, shard: int) -> Any:
        """The open file of a shard, one per process, so that no other process moves its position."""
        return self._opened(shard, os.getpid())

    @functools.cached_property
    def _opened(self) -> Callable[[int, int], Any]:
        return functools.lru_cache(KEPT)(lambda shard, process: _open(self.shards[shard]))

    @functools.cached_property
    def _column(self) -> Callable[[str], Callable[[int], Any]]:
        """Column -> a function that reads one of its row groups and caches the last few."""
        return functools.cache(lambda name: functools.lru_cache(KEPT)(functools.partial(self._read_group, name)))


def _require_rows(found: int, declared: int) -> None:
    if found != declared:  # every later row would be that of another image
        raise ValueError(f"it has {found:,} rows instead of {declared:,}")


def _open(where: str) -> Any:
    parquet = imports.need("pyarrow.parquet", f"The file {where}")
    with faults.reading(where, "a parquet file", damaged=(Exception,)):  # every store raises its own exceptions
        if not is_remote(where):
            return parquet.ParquetFile(where, memory_map=True)  # workers share the pages
        import fsspec

        return parquet.ParquetFile(fsspec.open(where, "rb").open())
