"""Estimate the contents, size and time of a preparation from a short measurement, without writing."""

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa.base.ahead import by_processes
from repa.base.errors import UserError
from repa.data.config import TEXT, PrepareConfig
from repa.data.encoding import FeatureFields, Fields, load_model
from repa.data.manifest import Settings
from repa.data.progress import FinishedParts, PlannedShard, chosen_parts, plan_shards
from repa.data.reading import DecodedImages, Read, from_source, pieces_at
from repa.data.sources.opening import open_source


@dataclass(frozen=True)
class Plan:
    """The estimate of a preparation."""

    source: str
    num_images: int
    num_classes: int
    num_copies: int
    """1, or 2 with mirrored copies."""
    num_shards: int
    num_todo: int
    """Images with missing parts."""
    sizes: dict[str, int]
    """Field -> bytes of all images."""
    rates: dict[str, float]
    """Step -> images per second: decoding (all worker processes), then each model."""

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def rate(self) -> float:
        """Images per second of one process: workers decode while the models encode one after another."""
        decode, *models = self.rates.values()
        return min(decode, 1 / sum(1 / rate for rate in models))

    def seconds(self, world: int = 1) -> float:
        """Time that `world` processes like this one need for the missing parts."""
        return self.num_todo / self.rate / world


def make_plan(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig,
    *,
    only: Sequence[str] = (),
    seconds: float = 60.0,
    device: torch.device | str = "cpu",
) -> Plan:
    """Inspect the source and the folder, load the models, and time them on images from all parts of the source.

    Args:
        source: as for `prepare`.
        out: as for `prepare`.
        config: as for `prepare`.
        only: as for `prepare`.
        device: as for `prepare`.
        seconds: limit of the measurement over all steps; small sources take less.

    Raises:
        UserError: any error that `prepare` would raise before its first image.
    """
    out, device = Path(out), torch.device(device)
    images = open_source(source, labels=config.labels)
    images.require_fit(config)
    requested = Settings(source=images.identity, class_names=tuple(images.class_names), config=config)
    shards = plan_shards(len(images), config.shard_size, config.flip)
    finished = FinishedParts(out, requested, len(shards))
    config = finished.settings.config
    chosen = [name for name in chosen_parts(only, config) if name != TEXT]
    models = {name: load_model(name, config, device) for name in chosen}
    for model in models.values():
        # any basis takes the same time as the correct one, which would need a pass over a sample of the images
        if isinstance(model, FeatureFields) and model.num_directions:
            model.use_basis(np.zeros((1 + model.num_directions, model.model.dim), np.float32), "")
    there = zip(shards, finished.parts, strict=True)
    rows = sum(len(shard.rows) for shard in shards)
    made = functools.partial(from_source, images, config.resolution)
    read = functools.partial(by_processes, made, num_workers=config.num_workers)
    return Plan(
        source=images.identity["name"],
        num_images=len(images),
        num_classes=len(images.class_names),
        num_copies=1 + config.flip,
        num_shards=len(shards),
        num_todo=sum(len(shard.rows) for shard, parts in there if not models.keys() <= parts.keys()),
        sizes={field: size * rows for model in models.values() for field, size in model.sizes.items()},
        rates=_measure(read, models, shards, config.batch_size, seconds),
    )


def _measure(
    read: Read, models: dict[str, Fields], shards: Sequence[PlannedShard], batch_size: int, seconds: float
) -> dict[str, float]:
    """Images per second of decoding and of each model, each within its part of `seconds` or until the source ends."""
    # shuffled: a sorted source may begin with its smallest images
    total = sum(len(shard.rows) for shard in shards)
    places = np.random.default_rng(0).permutation(total)
    budget = seconds / (1 + len(models))
    kept: list[DecodedImages] = []
    with contextlib.closing(read(pieces_at(shards, places))) as stream:
        decoded, begin = 0, time.perf_counter()
        for _, images in stream:
            if not decoded:  # the clock starts with the first image: starting the workers takes seconds, once
                begin = time.perf_counter()
            decoded += 1
            kept += [images] if len(kept) < batch_size and len(images.labels) else []
            if (spent := time.perf_counter() - begin) > budget:
                break
    if not kept:
        raise UserError("None of the tested images can be read: give another source.")
    rates = {"decode": max(decoded - 1, 1) / spent}
    batch = DecodedImages(np.concatenate([i.pixels for i in kept]), np.concatenate([i.labels for i in kept]), [], [])
    for name, model in models.items():
        model.encode(batch)  # not measured: the first call chooses kernels and allocates memory
        num, begin = 0, time.perf_counter()
        while num == 0 or (num < total and time.perf_counter() - begin < budget):
            model.encode(batch)
            num += len(batch.labels)
        rates[name] = num / (time.perf_counter() - begin)
    return rates
