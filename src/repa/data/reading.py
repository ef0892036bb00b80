"""Batches for the encoders: images decoded and cropped from a source by worker processes, or read from shards; captions too."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from repa.base.errors import UserError
from repa.base.launch import die_with_parent
from repa.data.captions import lines_of, texts_of
from repa.data.loader import ahead
from repa.data.progress import Piece, PlannedShard
from repa.data.reader import ShardReader
from repa.data.sources.contract import Source
from repa.data.stored_files import Shard

AHEAD = 3  # batches of each worker


class DecodedImages(NamedTuple):
    """The images of a piece, without those that cannot be read."""

    pixels: np.ndarray  # (n, 3, R, R) uint8
    labels: np.ndarray  # (n,) int64
    captions: list[tuple[str, ...]]  # of each image; empty where the source has none
    bad: list[tuple[str, str]]  # name, reason
    moments: np.ndarray | None = None  # (n, 2C, h, w) float32, where they come with the source
    texts_before: int = 0  # that are stored of this shard already, where captions are encoded


Read = Callable[[Iterable[Piece]], Generator[tuple[Piece, DecodedImages], None, None]]


def most_workers() -> int:
    """Worker processes that this machine takes at most."""
    # each holds 150 MB; those that wait for a remote source need no core, so 16 a core may be right
    return max(32, 16 * (os.cpu_count() or 1))


@dataclass(frozen=True)
class FromSource(Dataset):
    """Decodes pieces in worker processes.

    Threads would not do: Python runs one at a time between Pillow's calls, and the models need theirs. Batches come as
    NumPy arrays through pipes, since PyTorch moves tensors through shared memory, which is 64 MB in many containers.
    """

    source: Source
    resolution: int
    num_workers: int

    def __call__(self, pieces: Iterable[Piece]) -> Generator[tuple[Piece, DecodedImages], None, None]:
        """The images of each piece, in order. Pieces are taken a few ahead, in this process, after the workers have started."""
        if self.num_workers > most_workers():
            raise UserError(
                f"num_workers was given {self.num_workers:,}, but this machine takes at most {most_workers()}: give fewer."
            )
        with warnings.catch_warnings():  # of more workers than cores, which is right for a remote source
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            loader = DataLoader(
                self, batch_size=None, sampler=pieces, num_workers=self.num_workers, collate_fn=tuple,  # an item is a batch
                prefetch_factor=AHEAD if self.num_workers else None, worker_init_fn=functools.partial(die_with_parent, os.getpid()),
            )  # fmt: skip
            stream = iter(loader)
        for piece, images in stream:
            if isinstance(images, UserError):
                raise images
            yield piece, images

    def __getitem__(self, piece: Piece) -> tuple[Piece, DecodedImages | UserError]:
        try:
            return piece, self.decode(piece)
        except UserError as error:  # returned, as the loader would raise it with a traceback of the worker in its text
            return piece, error

    def decode(self, piece: Piece) -> DecodedImages:
        """The images of a piece, those that cannot be read by name."""
        source, pixels, given, kept, bad = self.source, [], [], [], []
        for index in piece.rows:
            try:
                image = np.asarray(source.image(index, self.resolution))
                moments = source.moments(index) if source.moments_shape else None
            except UserError as error:
                bad.append((source.name(index), str(error)))
                continue
            pixels.append(image)
            given.append(moments)
            kept.append(index)
        captions = [_captions(source, index) for index in kept] if source.has_captions else []
        if not kept:
            return DecodedImages(
                np.empty((0, 3, self.resolution, self.resolution), np.uint8), source.labels[:0], captions, bad
            )
        batch = np.stack(pixels)  # (n, R, R, 3)
        if piece.flipped:
            batch = batch[:, :, ::-1]
        batch = np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
        # mirrored images have other moments than mirrored ones of the originals: they are encoded
        stored = [row for row in given if row is not None and not piece.flipped]
        return DecodedImages(batch, source.labels[kept], captions, bad, np.stack(stored) if stored else None)


@dataclass(frozen=True)
class FromShards:
    """Reads stored images; threads do, because all they do is wait for the disk."""

    reader: ShardReader

    def __call__(self, pieces: Iterable[Piece]) -> Generator[tuple[Piece, DecodedImages], None, None]:
        with contextlib.closing(ahead(self._read, pieces, depth=AHEAD)) as stream:
            yield from stream

    def _read(self, piece: Piece) -> tuple[Piece, DecodedImages]:
        indices = np.arange(piece.rows.start, piece.rows.stop)
        return piece, DecodedImages(
            self.reader.gather("images", indices), self.reader.gather("labels", indices), [], []
        )


@dataclass(frozen=True)
class FromCaptions:
    """Reads the captions of stored shards, without their images."""

    folder: Path
    shards: Mapping[int, Shard]

    def __call__(self, pieces: Iterable[Piece]) -> Generator[tuple[Piece, DecodedImages], None, None]:
        shard, captions, before = None, [], 0
        for piece in pieces:
            if piece.shard != shard:
                shard, captions, before = piece.shard, self._read(piece.shard), 0
            texts = captions[piece.rows.start : piece.rows.stop]
            num = len(texts)
            yield (
                piece,
                DecodedImages(np.empty((num, 0), np.uint8), np.zeros(num, np.int64), texts, [], texts_before=before),
            )
            # the first text of a shard is the empty one, which its first piece brings
            before += (before == 0) + sum(map(len, texts))

    def _read(self, shard: int) -> list[tuple[str, ...]]:
        stored = self.shards[shard]
        if stored.captions is None:
            return [()] * stored.num
        path = self.folder / stored.captions.file
        return [texts_of(line, row, path) for row, line in enumerate(lines_of(path, stored.num))]


def sample_pieces(shards: Sequence[PlannedShard], num: int) -> list[Piece]:
    """About `num` images at equal distances over all shards, each a piece: a sample of every class of a sorted source."""
    ends = np.cumsum([len(shard.rows) for shard in shards])
    places = np.unique(np.linspace(0, ends[-1] - 1, min(num, int(ends[-1]))).astype(np.int64))
    numbers = np.searchsorted(ends, places, side="right")
    pieces = []
    for place, k in zip(places.tolist(), numbers.tolist(), strict=True):
        row = shards[k].rows[place - int(ends[k]) + len(shards[k].rows)]
        pieces.append(Piece(k, range(row, row + 1), shards[k].flipped))
    return pieces


def _captions(source: Source, index: int) -> tuple[str, ...]:
    """The captions of an image; () where they cannot be read."""
    # which does not lose the image: the manifest counts how many have captions
    try:
        return source.captions(index)
    except UserError:
        return ()
