"""Prepare a source, or add to a prepared folder: checks of the request, then jobs for `pipeline.run`; or only plan it.

Any number of processes can share a call; the same call continues an interrupted one.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar, Unpack

import numpy as np
import torch

from repa.base import lock
from repa.base.ahead import by_processes, by_threads
from repa.base.device import checked_device
from repa.base.errors import UserError, require_type
from repa.conditions.loading import require_text_encoder
from repa.data.config import BASE, TEXT, PrepareConfig
from repa.data.encoding import FeatureFields, Fields, load_model
from repa.data.manifest import PARTS, Inventory, Manifest, Settings
from repa.data.pipeline import Execution, Job, run
from repa.data.progress import FinishedParts, PlannedShard, chosen_parts, plan_shards, started
from repa.data.reader import ShardReader
from repa.data.reading import DecodedImages, Read, from_captions, from_shards, from_source, pieces_at
from repa.data.sources.contract import Source
from repa.data.sources.opening import open_source
from repa.encoders import canonical

P = ParamSpec("P")
Result = TypeVar("Result")
AHEAD = 3  # batches read from the folder before they are encoded
ATTEMPTS = 3


def repeated(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function, called again if parts/ vanished because another process finished the folder meanwhile."""

    # safe to repeat at any point, because each attempt makes only what is missing
    @functools.wraps(function)
    def attempts(*args: P.args, **options: P.kwargs) -> Result:
        for _ in range(ATTEMPTS):
            try:
                return function(*args, **options)
            except (FileNotFoundError, FileExistsError) as error:
                if PARTS not in Path(str(error.filename)).parts:
                    raise
        return function(*args, **options)

    return attempts


class Request(NamedTuple):
    """A source and what is to be made of it."""

    images: Source
    settings: Settings
    shards: list[PlannedShard]
    read: Read


def _request(source: str | Path | Source, config: PrepareConfig) -> Request:
    require_type(config, PrepareConfig, "The settings of a preparation are a PrepareConfig(resolution=...)")
    images = open_source(source, labels=config.labels)
    if images.moments_shape:
        images.require_fit(config)
    inventory, names = Inventory(labels_from=images.labels_from, left_out=dict(images.left_out)), images.class_names
    settings = Settings(source=images.identity, class_names=tuple(names), config=config, inventory=inventory)
    shards = plan_shards(len(images), config.shard_size, config.flip)
    decoded = functools.partial(from_source, images, config.resolution)
    return Request(images, settings, shards, functools.partial(by_processes, decoded, num_workers=config.num_workers))


@repeated
def prepare(
    source: str | Path | Source,
    out: str | Path,
    config: PrepareConfig,
    *,
    only: Sequence[str] = (),
    **execution: Unpack[Execution],
) -> Manifest | None:
    """Make the shards of `source` in folder `out`; returns their manifest.

    The same call continues after an interruption, adds encoders that are new in config.features, restores missing
    files, and does nothing if everything exists.

    Processes share the work without messages: process `rank` of `world` makes every world-th shard and returns, and the
    last to finish writes the manifest; all others return None. Simultaneous equal calls on one folder share the work
    too, on file systems with locks. The next call finishes what a killed process left unfinished.

    Args:
        source: as for `open_source`.
        out: a new or empty folder, or one made by this function from the same source and configuration.
        config: the settings.
        only: the parts to make; empty: all. "base" (labels, images, moments, captions), "features:ENCODER" or "text".
        execution: rank, world, progress and device: see `Execution`.

    Raises:
        UserError: a problem of the source, an image, a setting or the disk; finished shards stay.
    """
    out, (images, requested, shards, read) = Path(out), _request(source, config)
    with lock.shared(out, "repa prepare"):
        finished = FinishedParts(out, requested, len(shards))
        config = finished.settings.config
        chosen = chosen_parts(only, config)
        if TEXT in chosen and not images.has_captions:
            raise UserError(
                f"{images.identity['name']} has no captions, so text {config.text!r} has nothing to encode: leave it out, or put the "
                "captions into dog.txt beside dog.jpg, or into a metadata.csv in the folder with columns "
                "file_name and caption."
            )
        if TEXT in chosen and any(TEXT not in there for there in finished.parts):
            require_text_encoder(config.text, config.text_weights)  # now, because the images may take hours
        parts = [name for name in chosen if name != TEXT]
        manifest = run(Job(finished, shards, parts, read), **execution) if parts else None
        if TEXT in chosen:  # made from the stored captions
            manifest = run(_of_captions(out, finished.settings, len(shards)), **execution)
        return manifest


@repeated
def add(
    out: str | Path,
    part: str,
    *,
    weights: str | None = None,
    form: str = "fp16",
    **execution: Unpack[Execution],
) -> Manifest | None:
    """Add the tokens of another encoder to a prepared folder from its stored images or captions, without the source.

    Args:
        out: a folder made by `prepare`.
        part: "features:ENCODER"; "text:ENCODER", or "text" for the text encoder of the folder's settings.
        weights: local weights of that encoder; None for the default.
        form: stored form of its tokens: fp16, int8, for images also pcaK or pcaK-int8.
        execution: as for `prepare`.

    Raises:
        UserError: the folder stores no images or captions, or has tokens of another text encoder, or loading fails.
    """
    out, (kind, _, spec) = Path(out), part.partition(":")
    with lock.shared(out, "repa prepare"):
        manifest = Manifest.open(out)
        config, num_shards = manifest.config, len(manifest.shards)
        if kind == TEXT:
            if not any(shard.captions for shard in manifest.shards):
                raise UserError(f"{out} holds no captions to encode: prepare a source with captions.")
            begun = started(out)
            assert begun is not None  # it has a manifest
            config = begun.config  # includes the settings of an interrupted call
            text = {"text": spec, "text_form": form} if spec else {}
            config = config.override(**text, text_weights=weights or config.text_weights)
            if not config.text:
                raise UserError(f"{out} has no text encoder yet: give one, such as --text clip-l.")
            return run(_of_captions(out, manifest.settings(config=config), num_shards), **execution)
        if kind != "features" or not spec:
            raise UserError(f"{part!r} cannot be added to {out}: give features:ENCODER or text:ENCODER.")
        if not config.store_images:
            raise UserError(
                f"{out} stores no images to encode: run `repa prepare` on the source with --features {spec}."
            )
        if (spec := canonical(spec)) not in config.features:
            forms = {**config.feature_forms, spec: form}
            config = config.override(features=(*config.features, spec), feature_forms=forms)
        if weights:
            config = config.override(feature_weights={**config.feature_weights, spec: weights})
        # other files may be missing, because this call restores them
        manifest.require_intact(out, [s.files[name] for s in manifest.shards if s.num for name in ("images", "labels")])
        reader = ShardReader(out, manifest.shards)
        shards = [PlannedShard(range(*ends)) for ends in zip(reader.starts.tolist(), reader.ends.tolist(), strict=True)]
        read = functools.partial(by_threads, functools.partial(from_shards, reader), depth=AHEAD)
        finished = FinishedParts(out, manifest.settings(config=config), num_shards)
        return run(Job(finished, shards, [spec], read), **execution)


def _of_captions(out: Path, requested: Settings, num_shards: int) -> Job:
    """The job of encoding captions from the folder; tokens depend only on its files and the text encoder."""
    finished, shards = FinishedParts(out, requested, num_shards), []
    stored = {k: parts[BASE].shard for k, parts in enumerate(finished.parts) if BASE in parts}
    for k in range(num_shards):
        has_texts = k in stored and not stored[k].flipped  # a mirrored copy shares the captions of its original
        shards.append(PlannedShard(range(stored[k].num if has_texts else 0), is_ready=k in stored))
    read = functools.partial(by_threads, from_captions(out, stored), depth=AHEAD)
    return Job(finished, shards, [TEXT], read)


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
    device, (images, requested, shards, read) = checked_device(device), _request(source, config)
    finished = FinishedParts(Path(out), requested, len(shards))
    config = finished.settings.config
    chosen = [name for name in chosen_parts(only, config) if name != TEXT]
    models = {name: load_model(name, config, device) for name in chosen}
    for model in models.values():
        # any basis takes the same time as the correct one, which would need a pass over a sample of the images
        if isinstance(model, FeatureFields) and model.num_directions:
            model.use_basis(np.zeros((1 + model.num_directions, model.model.dim), np.float32), "")
    there = zip(shards, finished.parts, strict=True)
    num_images = sum(len(shard.indices) for shard in shards)
    return Plan(
        source=images.identity["name"],
        num_images=len(images),
        num_classes=len(images.class_names),
        num_copies=1 + config.flip,
        num_shards=len(shards),
        num_todo=sum(len(shard.indices) for shard, parts in there if not models.keys() <= parts.keys()),
        sizes={field: size * num_images for model in models.values() for field, size in model.sizes.items()},
        rates=_measure(read, models, shards, config.batch_size, seconds),
    )


def _measure(
    read: Read, models: Mapping[str, Fields], shards: Sequence[PlannedShard], batch_size: int, seconds: float
) -> dict[str, float]:
    """Images per second of decoding and of each model, each within its part of `seconds` or until the source ends."""
    # shuffled: a sorted source may begin with its smallest images
    total = sum(len(shard.indices) for shard in shards)
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
