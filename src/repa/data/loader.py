"""Batches for training: which images a step sees is a function of (seed, step) alone."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.base.rng import fold
from repa.data.manifest import FeatureField, Manifest
from repa.data.prefetch import ahead
from repa.data.shards import ShardReader
from repa.encoders.contract import Features

PREFETCH = 3  # batches


class Batch(NamedTuple):
    """One process's part of a step's batch, on its device."""

    labels: Tensor  # (N,) int64
    images: Tensor | None  # (N, 3, R, R) uint8
    moments: Tensor | None  # (N, 2C, h, w) float32
    features: dict[str, Features]  # encoder -> patches (N, T, D), pooled (N, D) or None; float32


class DataSet:
    """A prepared folder, opened: what it holds, and its rows."""

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        self.reader = ShardReader(folder, manifest)

    @property
    def num_bytes(self) -> int:
        """Size of all arrays on disk."""
        return sum(record.size for shard in self.manifest.shards for record in shard.files.values())

    @property
    def num_images(self) -> int:
        return self.manifest.num_images

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    @property
    def num_classes(self) -> int:
        return len(self.manifest.class_names)

    @property
    def resolution(self) -> int:
        return self.manifest.resolution

    @property
    def autoencoder(self) -> str:
        """The spec of the autoencoder that it was prepared with."""
        return self.manifest.config.autoencoder

    @property
    def has_images(self) -> bool:
        return "images" in self.manifest.fields

    @property
    def has_moments(self) -> bool:
        return "moments" in self.manifest.fields

    @property
    def features(self) -> dict[str, FeatureField]:
        """Encoder -> facts of its stored tokens."""
        return self.manifest.features

    @property
    def latent_channels(self) -> int:
        """Channels C of what the network sees; pixels when no moments (2C) are stored."""
        _, shape = self.manifest.fields["moments" if self.has_moments else "images"]
        return shape[0] // 2 if self.has_moments else shape[0]

    @property
    def latent_size(self) -> int:
        """Side of what the network sees."""
        return self.manifest.fields["moments" if self.has_moments else "images"][1][-1]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64."""
        return self.gather("labels", np.arange(self.num_images))

    def gather(self, field: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a field (images, labels, moments, features.NAME, pooled.NAME), as stored, in the order of `indices` (n,).

        Raises UserError when there is no such field.
        """
        return self.reader.gather(field, indices)

    def check(self) -> None:
        """Compare every byte with its checksum; raises UserError."""
        self.reader.check()

    def summary(self) -> dict[str, Any]:
        """What identifies the data of a run; features may be added later without changing it."""
        return {
            "source": self.manifest.source,
            "num_images": self.num_images,
            "resolution": self.resolution,
            "class_names": list(self.class_names),
            "autoencoder": self.manifest.autoencoder,
        }


def open_data(path: str | Path) -> DataSet:
    """Open a folder made by `prepare`; raises UserError when it is missing, unfinished or damaged."""
    return DataSet(path, Manifest.open(path))


class Loader:
    """An endless sequence of shuffled batches.

    Position p of the sequence is image permutation(epoch p // N)[p % N]; step s takes positions s*B to (s+1)*B - 1, and
    process r of W the r-th of W equal parts. So any number of processes sees the same order, and resuming needs
    the step alone.

    Args:
        data: an opened data set.
        batch_size: B, images in a step over all processes.
        seed: of the order.
        features: encoders whose stored tokens are wanted.
        images: whether the images are wanted; stored moments always come.
        rank, world: this process, and how many there are.
        device: where batches go.

    Raises:
        UserError: B is no multiple of `world`, or the data hold no such tokens or no images.
    """

    def __init__(
        self, data: DataSet, *, batch_size: int, seed: int, features: Sequence[str] = (), images: bool = False,
        rank: int = 0, world: int = 1, device: torch.device | str = "cpu",
    ):  # fmt: skip
        if batch_size % world:
            raise UserError(
                f"A batch of {batch_size} images cannot be shared equally by {world} processes: "
                f"choose a multiple of {world}."
            )
        for name in features:
            if name not in data.features:
                stored = ", ".join(data.features) or "none"
                raise UserError(
                    f"The data in {data.folder} holds no tokens of {name!r} (it holds {stored}): "
                    "add them with `repa prepare --features`."
                )
        if images and not data.has_images:
            raise UserError(f"The data in {data.folder} holds no images: prepare it with --store-images.")
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.fields = ["labels", *(["images"] if images else []), *(["moments"] if data.has_moments else [])]
        for name in features:
            self.fields += [f"features.{name}", *([f"pooled.{name}"] if data.features[name].pooled else [])]
        self.names = tuple(features)
        self._permutation = functools.lru_cache(2)(
            self._permute
        )  # a batch may need the end of one epoch and the start of the next

    def indices(self, step: int) -> np.ndarray:
        """Images of this process in step `step`, (B / world,) int64."""
        size = self.batch_size // self.world
        start = step * self.batch_size + self.rank * size
        epochs, places = np.divmod(np.arange(start, start + size), self.data.num_images)
        return np.concatenate([self._permutation(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def batch(self, step: int) -> Batch:
        """The batch of step `step`: a pure function of (seed, step, rank, world)."""
        return self._to_device(self._read(step))

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches of start_step, start_step + 1, ...; one thread reads ahead. Close the iterator to stop the thread."""
        on_start = functools.partial(torch.cuda.set_device, self.device) if self.device.type == "cuda" else None
        stream = ahead(self._read, itertools.count(start_step), PREFETCH, on_start=on_start)
        try:
            for rows in stream:
                yield self._to_device(rows)
        finally:
            stream.close()

    def _permute(self, epoch: int) -> np.ndarray:
        stream = np.random.Generator(np.random.Philox(fold(self.seed, "epoch", epoch)))
        return stream.permutation(self.data.num_images)

    def _read(self, step: int) -> dict[str, Tensor]:
        indices = self.indices(step)
        rows = {field: torch.from_numpy(self.data.gather(field, indices)) for field in self.fields}
        if self.device.type == "cuda":
            rows = {field: tensor.pin_memory() for field, tensor in rows.items()}  # so that the copy does not wait
        return rows

    def _to_device(self, rows: dict[str, Tensor]) -> Batch:
        rows = {field: tensor.to(self.device, non_blocking=True) for field, tensor in rows.items()}
        rows = {field: tensor.float() if tensor.dtype == torch.float16 else tensor for field, tensor in rows.items()}
        features = {name: Features(rows[f"features.{name}"], rows.get(f"pooled.{name}")) for name in self.names}
        return Batch(rows["labels"], rows.get("images"), rows.get("moments"), features)
