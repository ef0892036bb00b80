"""Images to shards, once: read, encode, write, finish. Any number of processes; the same call continues an interrupted one."""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from repa.base import files, lock
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.encoding import FeatureFields, encode, load_model
from repa.data.finishing import finish, remove_parts
from repa.data.loader import ahead
from repa.data.manifest import MANIFEST, PARTS, Inventory, Manifest
from repa.data.progress import (
    Claims,
    FinishedParts,
    PlannedShard,
    Settings,
    chosen_parts,
    merge_settings,
    plan_shards,
    started,
)
from repa.data.reader import ShardReader
from repa.data.reading import FromCaptions, FromShards, FromSource, Read
from repa.data.sources.opening import open_source
from repa.data.sources.reference_layout import require_autoencoder
from repa.data.stored_files import BASE, TEXT
from repa.data.writing import Counter, Report, write_shards

ENCODED = 3  # batches that wait for the disk
ATTEMPTS = 3


class Execution(TypedDict, total=False):
    """How a call runs; by default one process, on the CPU, without reports."""

    rank: int
    """Number of this process: it makes shard k where k modulo `world` is `rank`."""
    world: int
    """Processes that share the work."""
    progress: Report | None
    """Called after every batch with (done, total, note): images of this process, and the bytes written."""
    device: torch.device | str
    """Where the models run."""


@dataclass(frozen=True)
class Job:
    """What is to be done in a folder, and how (see `Execution`).

    Attributes:
        shards: all of them, in order.
        parts: those that are made now.
        read: pieces -> their images.
    """

    out: Path
    settings: Settings
    shards: Sequence[PlannedShard]
    parts: Sequence[str]
    read: Read
    rank: int = 0
    world: int = 1
    progress: Report | None = None
    device: torch.device | str = "cpu"


def prepare(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig,
    *,
    only: Sequence[str] = (),
    **execution: Unpack[Execution],
) -> Manifest | None:
    """Make the shards of `source` in folder `out`; returns their manifest.

    The same call continues after an interruption, adds encoders that are new in config.features, makes again what is
    missing, and does nothing when all is there.

    Processes share the work without messages: process `rank` of `world` makes every world-th shard and returns, and the
    last to finish writes the manifest; all others return None. Equal calls on one folder at the same time share it too,
    on file systems with locks. What a killed process leaves unfinished is done by the next call.

    Args:
        source: what `open_source` takes.
        out: a new or empty folder, or one made by this function from the same source and configuration.
        config: what to make.
        only: make these parts alone: "base" (labels, images, moments, captions), "features:ENCODER" or "text".
        execution: rank, world, progress and device: see `Execution`.

    Raises:
        UserError: a source, image, setting or disk that the user can fix; finished shards stay.
    """
    out, images = Path(out), open_source(source, labels=config.labels)
    require_autoencoder(images, config)
    inventory = Inventory(labels_from=images.labels_from, left_out=dict(images.left_out))
    shards = plan_shards(len(images), config.shard_size, config.flip)
    names = tuple(images.class_names)
    with lock.shared(out, "repa prepare"):
        settings = merge_settings(
            out, Settings(source=images.identity, class_names=names, config=config, inventory=inventory)
        )
        config = settings.config
        chosen = chosen_parts(only, config)
        if TEXT in chosen and not images.has_captions:
            raise UserError(f"{source} has no captions, so text {config.text!r} has nothing to encode: leave it out.")
        parts = [name for name in chosen if name != TEXT]
        read = FromSource(images, config.resolution, config.num_workers)
        manifest = _run(Job(out, settings, shards, parts, read, **execution)) if parts else None
        if TEXT in chosen:  # made from the captions that the other parts have stored
            manifest = _run(_of_captions(out, settings, len(shards), execution))
        return manifest


def add_features(
    out: str | Path,
    spec: str,
    *,
    weights: str | None = None,
    form: str = "fp16",
    **execution: Unpack[Execution],
) -> Manifest | None:
    """Add the tokens of one more encoder to a prepared folder, from its stored images: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        spec: a name of ENCODERS or a dotted name.
        weights: local weights of that encoder; None for its own.
        form: how its tokens are stored: fp16, int8, pcaK or pcaK-int8.
        execution: as for `prepare`.

    Raises:
        UserError: the folder holds no images, or the encoder cannot be loaded.
    """
    out = Path(out)
    with lock.shared(out, "repa prepare"):
        manifest = Manifest.open(out)
        if not manifest.config.store_images:
            raise UserError(
                f"{out} holds no images to encode: run `repa prepare` on the source with --features {spec}."
            )
        config = manifest.config
        if spec not in config.features:
            forms = (*config.feature_forms, f"{spec}={form}")
            config = config.override(features=(*config.features, spec), feature_forms=forms)
        if weights:
            config = config.override(feature_weights=(f"{spec}={weights}", *config.feature_weights))
        settings = merge_settings(out, Settings.of(manifest, config))
        # other files may be missing, because they are about to be made again
        manifest.require_intact(out, [s.files[name] for s in manifest.shards if s.num for name in ("images", "labels")])
        reader = ShardReader(out, manifest.shards)
        shards = [PlannedShard(range(*ends)) for ends in zip(reader.starts.tolist(), reader.ends.tolist(), strict=True)]
        return _run(Job(out, settings, shards, [spec], FromShards(reader), **execution))


def add_text(
    out: str | Path,
    spec: str = "",
    *,
    weights: str | None = None,
    form: str = "fp16",
    **execution: Unpack[Execution],
) -> Manifest | None:
    """Add the tokens of the captions to a prepared folder that holds captions: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        spec: a text encoder; "" takes that of the folder's settings.
        weights, form, execution: as for `add_features`; form is fp16 or int8.

    Raises:
        UserError: the folder holds no captions, or tokens of another text encoder.
    """
    out = Path(out)
    with lock.shared(out, "repa prepare"):
        manifest = Manifest.open(out)
        if not any(shard.captions for shard in manifest.shards):
            raise UserError(f"{out} holds no captions to encode: prepare a source that has some.")
        text = {"text": spec, "text_form": form} if spec else {}
        begun = started(out)
        assert begun is not None  # it has a manifest
        before = begun.config  # with what an interrupted call asked for
        config = before.override(**text, text_weights=weights or before.text_weights)
        if not config.text:
            raise UserError(f"{out} names no text encoder yet: give one, as in --text clip-l.")
        settings = merge_settings(out, Settings.of(manifest, config))
        return _run(_of_captions(out, settings, len(manifest.shards), execution))


def _of_captions(out: Path, settings: Settings, num_shards: int, execution: Execution) -> Job:
    """The job of encoding captions: they are read from the folder, so tokens depend on its files and the text encoder alone."""
    progress, shards = FinishedParts(out), []
    found = {k: part.shard for k in range(num_shards) if (part := progress.part(k, BASE))}
    for k in range(num_shards):
        has_texts = k in found and not found[k].flipped  # a flipped copy has the captions of its original
        shards.append(PlannedShard(range(found[k].num if has_texts else 0), is_ready=k in found))
    return Job(out, settings, shards, [TEXT], FromCaptions(out, found), **execution)


def _run(job: Job) -> Manifest | None:
    """Make this process's share, then the manifest if everything is finished; None while others have work left."""
    # each attempt finds what is finished and makes the rest, so that it may be made again at any point
    for _ in range(ATTEMPTS):
        try:
            return _attempt(job)
        except (FileNotFoundError, FileExistsError):  # of parts/, which another process removed because all is finished
            if not (job.out / MANIFEST).is_file():
                raise
    return _attempt(job)


def _attempt(job: Job) -> Manifest | None:
    out, config, num_shards, progress = job.out, job.settings.config, len(job.shards), FinishedParts(job.out)
    device = torch.device(job.device)
    missing = {k: [name for name in job.parts if progress.part(k, name) is None] for k in range(num_shards)}
    lost = progress.missing_bases(job.parts)
    if progress.manifest and not lost and not any(missing.values()) and set(job.parts) <= progress.manifest.parts:
        # parts/ was left by a kill, or another process adds an encoder: `finish` tells which
        if (out / PARTS).is_dir():
            return finish(out, job.settings, num_shards) or progress.manifest
        remove_parts(out)
        return progress.manifest
    share = range(job.rank, num_shards, job.world)
    mine = {k: missing[k] for k in share if missing[k] and job.shards[k].is_ready}
    # Models are loaded before the first image, so that wrong weights are reported at once, and only those that are used.
    needed = {*lost, *itertools.chain(*mine.values())}
    models = {name: load_model(name, config, device) for name in job.parts if name in needed}
    progress.require_same_models({name: model.identity for name, model in models.items()}, num_shards)
    nums = [len(planned.rows) for planned in job.shards]
    size = sum(nums[k] * sum(models[name].sizes.values()) for k, names in mine.items() for name in names)
    files.require_space(out, size, f"Preparing {sum(nums[k] for k in mine):,} images")
    job.settings.save(out)
    for name, model in models.items():
        if isinstance(model, FeatureFields) and model.num_directions:
            # after the settings are saved: a folder that holds a basis and no settings would be refused as somebody else's
            model.use_stored_basis(out, job.read, job.shards)
            progress.require_same_models({name: model.identity}, num_shards)

    # a pipeline of three: workers read, one thread encodes, this one writes, so that the device waits for none of the others
    total, claims = sum(nums[k] for k in share), Claims(out, mine, {name: m.identity for name, m in models.items()})
    counter = Counter(job.progress, total, total - sum(nums[k] for k in mine))
    made = functools.partial(encode, models=models, skip_bad=config.skip_bad)
    on_start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    with (
        contextlib.closing(claims),
        contextlib.closing(job.read(claims.pieces(job.shards, config.batch_size, counter.skip))) as batches,
        contextlib.closing(ahead(made, batches, depth=ENCODED, on_start=on_start)) as encoded,
    ):
        write_shards(encoded, job.shards, claims, counter, skip_bad=config.skip_bad)
    return finish(out, job.settings, num_shards)
