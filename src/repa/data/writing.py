"""Shards on disk: one .npy file for each field, written in one pass, and a record for each finished part."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from repa.base import files
from repa.base.arrays import npy_header
from repa.base.errors import UserError
from repa.data.config import BASE, TEXT, array_name
from repa.data.progress import Part, Piece, PlannedShard, record_path
from repa.data.reading import DecodedImages
from repa.data.records import ArrayFile, Shard, TextFile, captions_name, fields_of

Report = Callable[[int, int, str], None]  # done, total, note
# a batch, and the output of the models: field -> rows
EncodedBatch = tuple[Piece, DecodedImages, dict[str, np.ndarray]]


@dataclass
class Counter:
    """Counts the finished images and the written bytes of this process, and passes them to `report`."""

    report: Report | None
    total: int
    done: int
    num_bytes: int = 0

    def add(self, images: int, num_bytes: int) -> None:
        self.done, self.num_bytes = self.done + images, self.num_bytes + num_bytes
        if self.report:
            self.report(self.done, self.total, f"{files.size(self.num_bytes)} written")


def write_shard(
    out: Path,
    number: int,
    planned: PlannedShard,
    batches: Iterable[EncodedBatch],
    identities: Mapping[str, dict[str, Any]],
    counter: Counter,
    *,
    skip_bad: bool,
) -> None:
    """Write the batches of a shard, and a record of each part that they contain.

    Args:
        number: of the shard.
        identities: part -> identity of its model.
        skip_bad: whether to skip unreadable images.

    Raises:
        UserError: images are unreadable without `skip_bad`, or the disk is full.
    """
    bad: list[tuple[str, str]] = []
    with ShardWriter(out, number, expected=len(planned.indices)) as writer:
        for piece, images, fields in batches:
            bad += images.bad
            if fields:
                writer.append(fields, images.captions if BASE in identities else ())
            counter.add(len(piece.indices), sum(rows.nbytes for rows in fields.values()))
        # at the end of the shard, to count all its bad images; inside the block, so that no file appears
        if bad and not skip_bad:
            indices, finished = planned.indices, counter.done - len(planned.indices)
            raise UserError(
                f"{len(bad)} of the images {indices.start + 1:,} to {indices.stop:,} cannot be used. The first: "
                f"{bad[0][1].rstrip('.')}. Run the same command with --skip-bad to skip all such images and continue "
                f"after {finished:,} finished images. Or fix or remove them, and prepare into a new folder."
            )
    captions, records = writer.captions(), writer.records()
    for name, identity in identities.items():
        part_files = {field: file for field, file in records.items() if field in fields_of(name)}
        num = next((file.shape[0] for field, file in part_files.items() if name != TEXT or field == "text_rows"), 0)
        shard = Shard(
            num=num, flipped=planned.flipped, skipped=tuple(image for image, _ in bad),
            captions=captions if name == BASE else None, **{"text" if name == TEXT else "files": part_files},
        )  # fmt: skip
        part = Part(shard=shard, identity=identity)
        files.write_sealed(record_path(out, number, name), part.model_dump(mode="json"))


class ShardWriter:
    """Writes the fields of one shard in parallel, batch after batch; each file appears when it is complete.

    Args:
        folder: the folder of the shards.
        shard: number of the shard.
        expected: its number of images if none is skipped; then the checksums need no second read.
    """

    def __init__(self, folder: Path, shard: int, expected: int = 0):
        self.folder, self.shard, self.expected = folder, shard, expected
        self._stack = contextlib.ExitStack()
        self._arrays: dict[str, _GrowingArray] = {}
        self._captions: list[str] = []

    def append(self, fields: dict[str, np.ndarray], captions: Sequence[tuple[str, ...]] = ()) -> None:
        """Add one batch: field -> array (n, ...), and the captions of each image if it has a field for them."""
        for field, rows in fields.items():
            if field not in self._arrays:
                path = self._stack.enter_context(files.atomic_path(self._place(array_name(field, self.shard))))
                self._arrays[field] = self._stack.enter_context(
                    contextlib.closing(_GrowingArray(path, rows, self.expected))
                )
            self._arrays[field].append(rows)
        self._captions += [json.dumps(texts, ensure_ascii=False) + "\n" for texts in captions]

    def _place(self, name: str) -> Path:
        """The path of a file. Removes leftovers of a killed process: the writer of a shard holds its lock."""
        files.remove_leftovers(self.folder, name.__eq__)
        return self.folder / name

    def __enter__(self) -> "ShardWriter":
        self._stack.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def records(self) -> dict[str, ArrayFile]:
        """Field -> record of its file, after the end of the block."""
        return {
            field: array.record(self.folder / array_name(field, self.shard)) for field, array in self._arrays.items()
        }

    def captions(self) -> TextFile | None:
        """Write the captions, after the end of the block; None without captions."""
        if not self._captions:
            return None
        path = self._place(captions_name(self.shard))
        # a caption may contain half of a surrogate pair, which JSON can encode and UTF-8 cannot
        data = "".join(self._captions).encode(errors="replace")
        files.write_bytes(path, data)
        return TextFile(file=path.name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


class _GrowingArray:
    """An .npy file that grows; its header gets the length when it is closed.

    Plain writes raise an error on a full disk; a memory map would crash the process.
    """

    def __init__(self, path: Path, like: np.ndarray, expected: int = 0):
        self.file = open(path, "wb")  # noqa: SIM115
        self.dtype, self.row = like.dtype, like.shape[1:]
        self.num, self.expected = 0, expected
        header = self._header(expected)
        self.file.write(header)
        self.start = len(header)
        # starts with the header for `expected` rows; with other rows, `record` reads the file again
        self.digest = hashlib.sha256(header)

    def append(self, rows: np.ndarray) -> None:
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.row), (rows.dtype, rows.shape)
        data = np.ascontiguousarray(rows).data
        self.file.write(data)
        self.digest.update(data)
        self.num += len(rows)

    def close(self) -> None:
        try:
            self.file.seek(0)
            self.file.write(self._header(self.num))
            assert self.file.tell() == self.start  # NumPy leaves room for a longer first dimension
        finally:
            self.file.close()

    def _header(self, num: int) -> bytes:
        return npy_header(self.dtype, (num, *self.row))

    def record(self, path: Path) -> ArrayFile:
        return ArrayFile(
            file=path.name,
            dtype=str(self.dtype),
            shape=(self.num, *self.row),
            size=path.stat().st_size,
            sha256=self.digest.hexdigest() if self.num == self.expected else files.sha256(path),
        )
