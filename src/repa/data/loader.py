"""Batches for training, read ahead by threads; the images of a step are a function of (seed, step) alone."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base.ahead import by_threads
from repa.base.device import checked_device
from repa.base.errors import UserError, require_type
from repa.base.rng import fold
from repa.conditions import Text
from repa.data.dataset import DataSet
from repa.data.order import WINDOW, GlobalShuffle, WindowShuffle
from repa.data.packing import unpack
from repa.data.reader import StoredText
from repa.data.records import ArrayFile, Shard
from repa.data.remote import FetchAhead
from repa.encoders.contract import Features

DEPTH = 4  # batches to read ahead
READERS = 2  # threads: a read is mostly a copy by the system, during which other threads can run
BLOCK = 8192  # positions of the order computed at a time, at most an epoch


class Batch(NamedTuple):
    """One process's part of a step's batch, on its device."""

    labels: Tensor  # (N,) int64
    images: Tensor | None  # (N, 3, R, R) uint8
    moments: Tensor | None  # (N, M, h, w) as stored, float16: `Autoencoder.sample` computes in float32
    features: dict[str, Features]  # encoder -> patches (N, T, D) float16 as stored or float32, pooled (N, D) or None
    text: Text | None = None  # tokens (N, S, E) float32 of one caption of each image
    captions: Sequence[str] = ()  # or the N captions themselves


class _StoredBatch(NamedTuple):
    """A batch in stored form, on its way to the device."""

    names: tuple[str, ...]  # of encoders
    fields: dict[str, Tensor]
    copied: "torch.cuda.Event | None"
    text: StoredText | None = None
    captions: Sequence[str] = ()

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors to copy."""
        return [*self.fields.values(), *(part for part in self.text or () if part is not None)]


class Loader:
    """An endless sequence of shuffled batches.

    Position p of the sequence is place p % N of epoch p // N; step s reads positions s*B to (s+1)*B - 1, and process r
    of W the r-th of W equal parts. So any number of processes sees the same order, and resuming needs only the step.
    Remote data is shuffled shard by shard (`order.WindowShuffle`), local data over all images.

    Args:
        data: an opened data set.
        batch_size: B, the global batch size.
        seed: of the order.
        features: encoders whose stored tokens to read, or a function of the step that returns them; it is called in
            another thread, some steps ahead.
        images: whether to read images, or a function of the step; stored moments are always read.
        pooled: whether to read pooled features in addition to the tokens.
        text: "tokens" or "captions" of one caption per image, chosen for each position; "": neither.
        rank: index of this process.
        world: number of processes.
        device: the device of batches. CUDA: copied from pinned memory on a separate stream while other steps compute.

    Raises:
        UserError: B is not a multiple of `world`, or the data lack these tokens or images.
    """

    def __init__(
        self, data: DataSet, *, batch_size: int, seed: int,
        features: Sequence[str] | Callable[[int], Sequence[str]] = (), images: bool | Callable[[int], bool] = False,
        pooled: bool = False, text: Literal["", "tokens", "captions"] = "",
        rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
    ):  # fmt: skip
        require_type(data, DataSet, "A loader needs data that repa.open_data opened")
        require_type(batch_size, int, "The batch size is a number")
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"{world} processes cannot share a batch of {batch_size} images equally: choose a multiple of {world}."
            )
        self.data, self.batch_size, self.pooled, self.text, self.seed = data, batch_size, pooled, text, seed
        self.rank, self.world, self.device = rank, world, checked_device(device)
        self._features = features if callable(features) else lambda step: features
        self._images = images if callable(images) else lambda step: images
        self.fields(0)  # raises the error here instead of in a thread at the first step
        self.order: GlobalShuffle | WindowShuffle = GlobalShuffle(self.data.num_images, seed)
        if data.stream:
            self.order = WindowShuffle([shard.num for shard in data.manifest.shards], seed)
            # the shards of this window and of the next; otherwise the second would evict the first while it is read
            largest = max(sum(file.size for file in self._needed(shard, 0)) for shard in data.manifest.shards)
            data.stream.require_room(2 * WINDOW * largest)
        self._labels = data.small_labels
        self._length = min(BLOCK, self.data.num_images)
        # the steps read ahead may be in as many blocks, each with its neighbour
        self._block = functools.lru_cache(2 * DEPTH)(self._ordered)
        self._basis = functools.cache(lambda encoder: data.basis(encoder, self.device))
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def indices(self, step: int) -> np.ndarray:
        """Images of this process in step `step`, (B / world,) int64."""
        size = self.batch_size // self.world
        start = step * self.batch_size + self.rank * size
        first, last = start // self._length, (start + size - 1) // self._length
        blocks = np.concatenate([self._block(number) for number in range(first, last + 1)])
        return blocks[start - first * self._length :][:size]

    def fields(self, step: int) -> list[str]:
        """The fields to read for a step; raises UserError if the data lack one."""
        fields = ["labels", *(["moments"] if self.data.has_moments else [])]
        if self._images(step):
            self.data.require_images()
            fields.append("images")
        for name in self._features(step):
            if name not in self.data.features:
                stored = ", ".join(self.data.features) or "none"
                raise UserError(
                    f"The data in {self.data.folder} have no tokens of {name!r} (only {stored}): "
                    "add them with `repa prepare --features`."
                )
            facts = self.data.features[name]
            fields.append(f"features.{name}")
            if facts.form.endswith("int8"):
                fields.append(f"scale.{name}")
            if self.pooled and facts.pooled:
                fields.append(f"pooled.{name}")
        return fields

    def batch(self, step: int) -> Batch:
        """The batch of step `step`: a pure function of (seed, step, rank, world)."""
        return self._finish(self._read(step))

    def iterate(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Batches of start_step, start_step + 1, ...; threads read ahead. Close the iterator to stop them."""
        on_start = functools.partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        with contextlib.ExitStack() as stack:
            fetcher = (
                stack.enter_context(contextlib.closing(FetchAhead(self.data.stream))) if self.data.stream else None
            )
            steps = self._fetching(itertools.count(start_step), fetcher) if fetcher else itertools.count(start_step)
            stream = stack.enter_context(
                contextlib.closing(by_threads(self._read, steps, DEPTH, READERS, on_start=on_start))
            )
            for stored in stream:
                yield self._finish(stored)

    def _ordered(self, block: int) -> np.ndarray:
        """Images at the positions of a block of the endless sequence."""
        positions = np.arange(block * self._length, (block + 1) * self._length)
        epochs, places = np.divmod(positions, self.data.num_images)
        return np.concatenate([self.order.rows(int(e), places[epochs == e]) for e in np.unique(epochs)])

    def _fetching(self, steps: Iterator[int], fetcher: FetchAhead) -> Iterator[int]:
        """The steps; before each, its shards and those of the next window are requested."""
        for step in steps:
            epoch, place = divmod(step * self.batch_size, self.data.num_images)
            shards = [self.data.manifest.shards[number] for number in self.order.shards_from(epoch, place)]
            fetcher.want(file for shard in shards for file in self._needed(shard, step))
            yield step

    def _needed(self, shard: Shard, step: int) -> list[ArrayFile]:
        """The files of a shard that a step reads; none for an empty shard."""
        fields = [shard.files[field] for field in self.fields(step)] if shard.num else []
        return fields + list(shard.text.values() if self.text == "tokens" else ())

    def _read(self, step: int) -> _StoredBatch:
        indices, fields = self.indices(step), {}
        for field in self.fields(step):
            dtype, shape = self.data.reader.fields[field]
            # rows are read into pinned memory: the copy to the device then needs neither another copy nor a wait
            rows = torch.empty((len(indices), *shape), dtype=getattr(torch, dtype), pin_memory=self._side is not None)
            if field == "labels" and self._labels is not None:
                rows.numpy()[:] = self._labels[indices]
            else:
                self.data.reader.gather(field, indices, out=rows.numpy())
            fields[field] = rows
        names = tuple(field.removeprefix("features.") for field in fields if field.startswith("features."))
        text, captions = self._chosen(step, indices)
        if self._side is None:
            text = text and text.to(lambda rows: rows.to(self.device))
            return _StoredBatch(
                names, {field: rows.to(self.device) for field, rows in fields.items()}, None, text, captions
            )
        # on a second stream the copy overlaps the computation of another step; the event marks its end
        with torch.cuda.stream(self._side):
            fields = {field: rows.to(self.device, non_blocking=True) for field, rows in fields.items()}
            text = text and text.to(lambda rows: rows.pin_memory().to(self.device, non_blocking=True))
            return _StoredBatch(names, fields, self._side.record_event(), text, captions)

    def _chosen(self, step: int, indices: np.ndarray) -> tuple[StoredText | None, list[str]]:
        """One caption per image of a step; the choice is a function of (seed, position in the endless sequence)."""
        if not self.text:
            return None, []
        start = step * self.batch_size + self.rank * len(indices)
        keys = [fold(self.seed, "caption", position) for position in range(start, start + len(indices))]
        if self.text == "tokens":
            return self.data.texts.gather(indices, keys), []
        captions = zip(self.data.captions(indices), keys, strict=True)
        return None, [texts[key % len(texts)] if texts else "" for texts, key in captions]

    def _finish(self, stored: _StoredBatch) -> Batch:
        """The batch on the device, with tokens unpacked from their stored form."""
        if stored.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(stored.copied)
            for tensor in stored.tensors:
                # the allocator knows only the stream that made the tensor, and would reuse its memory too early
                tensor.record_stream(current)
        features, fields = {}, stored.fields
        for name in stored.names:
            patches = fields[f"features.{name}"]
            if self.data.features[name].form != "fp16":
                patches = unpack(patches, fields.get(f"scale.{name}"), self._basis(name))
            pooled = fields.get(f"pooled.{name}")
            features[name] = Features(patches, pooled)
        text = stored.text and stored.text.unpacked()
        return Batch(fields["labels"], fields.get("images"), fields.get("moments"), features, text, stored.captions)
