"""Images to shards, once: read, encode, write, finish. Any number of processes; the same call continues an interrupted one."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypedDict, TypeVar, Unpack

import torch
from filelock import BaseFileLock

from repa.base import files, lock
from repa.base.ahead import by_processes, by_threads
from repa.base.errors import UserError
from repa.data.config import BASE, TEXT, PrepareConfig
from repa.data.encoding import FeatureFields, encode, load_model, require_same_model
from repa.data.finishing import finish
from repa.data.manifest import PARTS, SETTINGS_FILE, Inventory, Manifest, Settings, remove_parts
from repa.data.progress import FinishedParts, PlannedShard, chosen_parts, plan_shards, started
from repa.data.reader import ShardReader
from repa.data.reading import FromCaptions, Read, claimed, from_shards, from_source
from repa.data.sources.opening import open_source
from repa.data.writing import Counter, Report, write_shard
from repa.encoders import canonical

P = ParamSpec("P")
Result = TypeVar("Result")
AHEAD = 3  # batches that are read from the folder before they are encoded
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
        finished: what the folder holds already.
        shards: all of them, in order.
        parts: those that are made now.
        read: pieces -> their images.
    """

    finished: FinishedParts
    shards: Sequence[PlannedShard]
    parts: Sequence[str]
    read: Read
    rank: int = 0
    world: int = 1
    progress: Report | None = None
    device: torch.device | str = "cpu"


def repeated(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function, called again where parts/ vanished meanwhile, because another process found that all is finished."""

    # each attempt finds what is finished and makes the rest, so that it may be made again at any point
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


@repeated
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
    images.require_fit(config)
    inventory, names = Inventory(labels_from=images.labels_from, left_out=dict(images.left_out)), images.class_names
    asked = Settings(source=images.identity, class_names=tuple(names), config=config, inventory=inventory)
    shards = plan_shards(len(images), config.shard_size, config.flip)
    with lock.shared(out, "repa prepare"):
        finished = FinishedParts(out, asked, len(shards))
        config = finished.settings.config
        chosen = chosen_parts(only, config)
        if TEXT in chosen and not images.has_captions:
            raise UserError(
                f"{source} has no captions, so text {config.text!r} has nothing to encode: leave it out, or put the "
                "captions where they are looked for (dog.txt beside dog.jpg, or a metadata.csv in the folder with columns "
                "file_name and caption)."
            )
        made = functools.partial(from_source, images, config.resolution)
        read = functools.partial(by_processes, made, num_workers=config.num_workers)
        parts = [name for name in chosen if name != TEXT]
        manifest = _make(Job(finished, shards, parts, read, **execution)) if parts else None
        if TEXT in chosen:  # made from the captions that the other parts have stored
            manifest = _make(_of_captions(out, finished.settings, len(shards), execution))
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
    """Add the tokens of one more encoder to a prepared folder, from its stored images or captions: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        part: "features:ENCODER"; "text:ENCODER", or "text" for the text encoder of the folder's settings.
        weights: local weights of that encoder; None for its own.
        form: how its tokens are stored: fp16, int8, of images also pcaK or pcaK-int8.
        execution: as for `prepare`.

    Raises:
        UserError: the folder holds no images or captions, or tokens of another text encoder, or the encoder cannot be loaded.
    """
    out, (kind, _, spec) = Path(out), part.partition(":")
    with lock.shared(out, "repa prepare"):
        manifest = Manifest.open(out)
        config, num_shards = manifest.config, len(manifest.shards)
        if kind == TEXT:
            if not any(shard.captions for shard in manifest.shards):
                raise UserError(f"{out} holds no captions to encode: prepare a source that has some.")
            begun = started(out)
            assert begun is not None  # it has a manifest
            config = begun.config  # with what an interrupted call asked for
            text = {"text": spec, "text_form": form} if spec else {}
            config = config.override(**text, text_weights=weights or config.text_weights)
            if not config.text:
                raise UserError(f"{out} names no text encoder yet: give one, as in --text clip-l.")
            return _make(_of_captions(out, manifest.settings(config=config), num_shards, execution))
        if kind != "features" or not spec:
            raise UserError(f"{part!r} cannot be added to {out}: give features:ENCODER or text:ENCODER.")
        if not config.store_images:
            raise UserError(
                f"{out} holds no images to encode: run `repa prepare` on the source with --features {spec}."
            )
        if (spec := canonical(spec)) not in config.features:
            forms = (*config.feature_forms, f"{spec}={form}")
            config = config.override(features=(*config.features, spec), feature_forms=forms)
        if weights:
            config = config.override(feature_weights=(f"{spec}={weights}", *config.feature_weights))
        # other files may be missing, because they are about to be made again
        manifest.require_intact(out, [s.files[name] for s in manifest.shards if s.num for name in ("images", "labels")])
        reader = ShardReader(out, manifest.shards)
        shards = [PlannedShard(range(*ends)) for ends in zip(reader.starts.tolist(), reader.ends.tolist(), strict=True)]
        read = functools.partial(by_threads, functools.partial(from_shards, reader), depth=AHEAD)
        finished = FinishedParts(out, manifest.settings(config=config), num_shards)
        return _make(Job(finished, shards, [spec], read, **execution))


def _of_captions(out: Path, asked: Settings, num_shards: int, execution: Execution) -> Job:
    """The job of encoding captions: they are read from the folder, so tokens depend on its files and the text encoder alone."""
    finished, shards = FinishedParts(out, asked, num_shards), []
    found = {k: parts[BASE].shard for k, parts in enumerate(finished.parts) if BASE in parts}
    for k in range(num_shards):
        has_texts = k in found and not found[k].flipped  # a flipped copy has the captions of its original
        shards.append(PlannedShard(range(found[k].num if has_texts else 0), is_ready=k in found))
    read = functools.partial(by_threads, FromCaptions(out, found), depth=AHEAD)
    return Job(finished, shards, [TEXT], read, **execution)


def _make(job: Job) -> Manifest | None:
    """Make this process's share, then the manifest if everything is finished; None while others have work left."""
    before, out, settings = job.finished.manifest, job.finished.out, job.finished.settings
    missing = {k: [name for name in job.parts if name not in there] for k, there in enumerate(job.finished.parts)}
    # the basis is lost, but not the tokens that are coordinates in it: it is computed again
    stored = before.features if before else {}
    lost = [n for n in job.parts if n in stored and (basis := stored[n].basis) and not basis.intact(out)]
    is_done = before is not None and not lost and not any(missing.values()) and set(job.parts) <= before.parts
    if not is_done:
        _make_shards(job, missing, lost)
    elif not (out / PARTS).is_dir():
        remove_parts(out)
        return before
    # several may be the last at the same time: one writes, and the others find the same manifest
    with lock.held(out / PARTS / "finish.lock"):
        now = FinishedParts(out, settings, len(job.shards))
        if all(len(there) == len(now.names) for there in now.parts):
            # two that began at the same time saw nothing of each other's models before
            for name, part in now.parts[0].items():
                require_same_model(now, name, part.identity)
            return finish(now)
    return before if is_done else None  # parts/ is of a process that adds another encoder


def _make_shards(job: Job, missing: Mapping[int, Sequence[str]], lost: Sequence[str]) -> None:
    """Make the parts that are missing of this process's shards, and the bases that are lost."""
    out, config, device = job.finished.out, job.finished.settings.config, torch.device(job.device)
    share = range(job.rank, len(job.shards), job.world)
    mine = {k: missing[k] for k in share if missing[k] and job.shards[k].is_ready}
    # Models are loaded before the first image, so that wrong weights are reported at once, and only those that are used.
    needed = {*lost, *itertools.chain(*mine.values())}
    models = {name: load_model(name, config, device) for name in job.parts if name in needed}
    for name, model in models.items():
        require_same_model(job.finished, name, model.identity)
    nums = [len(planned.rows) for planned in job.shards]
    size = sum(nums[k] * sum(models[name].sizes.values()) for k, names in mine.items() for name in names)
    files.require_space(out, size, f"Preparing {sum(nums[k] for k in mine):,} images")
    files.write_sealed(out / PARTS / SETTINGS_FILE, job.finished.settings.model_dump(mode="json"))
    for name, model in models.items():
        if isinstance(model, FeatureFields) and model.num_directions:
            # after the settings are saved: a folder that holds a basis and no settings would be refused as somebody else's
            model.use_stored_basis(out, job.read, job.shards)
            require_same_model(job.finished, name, model.identity)

    # a pipeline of three: workers read, one thread encodes, this one writes, so that the device waits for none of the others
    total = sum(nums[k] for k in share)
    counter = Counter(job.progress, total, total - sum(nums[k] for k in mine))
    on_start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    claims: dict[int, list[BaseFileLock]] = {}
    pieces = claimed(out, job.shards, mine, claims, config.batch_size)
    made = functools.partial(encode, models=models, skip_bad=config.skip_bad)
    try:
        with (
            contextlib.closing(job.read(pieces)) as read,
            contextlib.closing(by_threads(made, read, depth=ENCODED, on_start=on_start)) as encoded,
        ):
            # batches come in the order of the shards, so that one is open at a time
            for (k, names), batches in itertools.groupby(encoded, key=lambda item: (item[0].shard, item[0].parts)):
                if names:
                    identities = {name: models[name].identity for name in names}
                    write_shard(out, k, job.shards[k], batches, identities, counter, skip_bad=config.skip_bad)
                else:  # others have made it, or make it now
                    counter.done += nums[k]
                for handle in claims.pop(k):  # after the records, or another process would make the parts again
                    lock.release(handle)
    finally:
        for handle in itertools.chain(*claims.values()):
            lock.release(handle)
