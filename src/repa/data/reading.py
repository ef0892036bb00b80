"""Read the input of the models piece by piece: images of a source, stored images or stored captions."""

import functools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from repa.base import lock
from repa.base.arrays import evenly_spaced
from repa.base.errors import UserError
from repa.data.manifest import MANIFEST, PARTS, SETTINGS_FILE, Manifest
from repa.data.progress import Piece, PlannedShard, finished_part, record_path
from repa.data.reader import ShardReader, lines_of, texts_of
from repa.data.records import Shard
from repa.data.sources.contract import Source


class DecodedImages(NamedTuple):
    """The readable images of a piece."""

    pixels: np.ndarray  # (n, 3, R, R) uint8
    labels: np.ndarray  # (n,) int64
    captions: list[tuple[str, ...]]  # of each image; empty if the source has none
    bad: list[tuple[str, str]]  # name, reason
    moments: np.ndarray | None = None  # (n, 2C, h, w) float32, if the source has them
    texts_before: int = 0  # texts of this shard that are encoded already


Read = Callable[[Iterable[Piece]], Generator[tuple[Piece, DecodedImages], None, None]]


def claimed(
    out: Path,
    shards: Sequence[PlannedShard],
    parts: Mapping[int, Sequence[str]],
    claims: dict[int, list[int]],
    size: int,
) -> Iterator[Piece]:
    """Pieces of the shards in `parts`; each shard is locked when its first piece is requested.

    Equal commands share a folder, so the parts of a shard are locked while they are made. `claims` receives the locks
    of each shard. A shard that another process has made, or makes now, yields one piece without images and parts.
    """
    # read again, because another process may have finished everything while this one loaded its models
    manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None
    for k, names in parts.items():
        claims[k], claimed_parts = [], []
        for name in names:
            if (handle := lock.take(record_path(out, k, name).with_suffix(".lock"))) is None:
                continue
            claims[k].append(handle)
            # another process may have finished everything and moved the records from parts/ to the manifest
            if not (out / PARTS / SETTINGS_FILE).is_file():
                manifest = Manifest.open(out)
            # checked again under the lock: another process may have finished the part and released its lock
            if finished_part(out, manifest, k, name):
                lock.release(claims[k].pop())
            else:
                claimed_parts.append(name)
        indices = shards[k].indices if claimed_parts else range(0)
        for at in range(0, max(len(indices), 1), size):  # a shard without images has an empty piece
            yield Piece(k, indices[at : at + size], shards[k].flipped, tuple(claimed_parts))


def from_source(source: Source, resolution: int, piece: Piece) -> tuple[Piece, DecodedImages]:
    """The images of a piece of a source, and the names of unreadable ones."""
    pixels, given_moments, kept, bad = [], [], [], []
    for index in piece.indices:
        try:
            image = np.asarray(source.image(index, resolution))
            moments = source.moments(index) if source.moments_shape else None
        except UserError as error:
            bad.append((source.name(index), str(error)))
            continue
        pixels.append(image)
        given_moments.append(moments)
        kept.append(index)
    captions = [_captions(source, index) for index in kept] if source.has_captions else []
    if not kept:
        return piece, DecodedImages(
            np.empty((0, 3, resolution, resolution), np.uint8), source.labels[:0], captions, bad
        )
    batch = np.stack(pixels)  # (n, R, R, 3)
    if piece.flipped:
        batch = batch[:, :, ::-1]
    batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    # the moments of a mirrored image are not the mirrored moments, so they are computed
    stored = [row for row in given_moments if row is not None and not piece.flipped]
    return piece, DecodedImages(batch, source.labels[kept], captions, bad, np.stack(stored) if stored else None)


def _captions(source: Source, index: int) -> tuple[str, ...]:
    """The captions of an image; () if they cannot be read."""
    # the image stays: the manifest counts the images with captions
    try:
        return source.captions(index)
    except UserError:
        return ()


def from_shards(reader: ShardReader, piece: Piece) -> tuple[Piece, DecodedImages]:
    """The stored images of a piece."""
    indices = np.arange(piece.indices.start, piece.indices.stop)
    return piece, DecodedImages(reader.gather("images", indices), reader.gather("labels", indices), [], [])


def from_captions(folder: Path, shards: Mapping[int, Shard]) -> Callable[[Piece], tuple[Piece, DecodedImages]]:
    """A function that reads the stored captions of a piece, without its images."""

    @functools.lru_cache(2)  # the pieces of a shard follow each other
    def captions_of(number: int) -> list[tuple[str, ...]]:
        shard = shards[number]
        if shard.captions is None:
            return [()] * shard.num
        path = folder / shard.captions.file
        return [texts_of(line, row, path) for row, line in enumerate(lines_of(path, shard.num))]

    def read(piece: Piece) -> tuple[Piece, DecodedImages]:
        captions, start = captions_of(piece.shard), piece.indices.start
        texts = captions[start : piece.indices.stop]
        # the first text of a shard is the empty text, which its first piece adds
        before = sum(map(len, captions[:start])) + (start > 0)
        empty = np.empty((len(texts), 0), np.uint8), np.zeros(len(texts), np.int64)
        return piece, DecodedImages(*empty, texts, [], texts_before=before)

    return read


def sample_pieces(shards: Sequence[PlannedShard], num: int) -> Iterator[Piece]:
    """About `num` images evenly spaced over all shards, one per piece: covers every class of a sorted source."""
    return pieces_at(shards, evenly_spaced(sum(len(shard.indices) for shard in shards), num))


def pieces_at(shards: Sequence[PlannedShard], places: np.ndarray) -> Iterator[Piece]:
    """The images at these places of all shards together, each a piece."""
    ends = np.cumsum([len(shard.indices) for shard in shards])
    for place in map(int, places):
        k = int(np.searchsorted(ends, place, side="right"))
        index = shards[k].indices[place - int(ends[k]) + len(shards[k].indices)]
        yield Piece(k, range(index, index + 1), shards[k].flipped)
