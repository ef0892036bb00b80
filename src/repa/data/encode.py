"""Images to shards, once: crop, encode, store. Any number of processes; the same call continues an interrupted one."""

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from repa.base import dist, files
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.groups import Group, Images, base_group, feature_group
from repa.data.manifest import Manifest, Shard
from repa.data.parts import BASE, Part, Progress, Settings, agree, assemble, begin, is_of
from repa.data.prefetch import ahead
from repa.data.shards import ShardReader, ShardWriter, array_name
from repa.data.sources import Source, open_source

Report = Callable[[int, int, str], None]  # done, total, what: images of this process


def prepare(
    source: str | Path,
    out: str | Path,
    config: PrepareConfig,
    *,
    progress: Report | None = None,
    device: torch.device | str = "cpu",
) -> Manifest:
    """Make the shards of `source` in folder `out`; returns their manifest.

    The same call continues after an interruption, adds encoders that are new in config.features, makes anew what is
    missing, and does nothing when all is there. Every process of a torchrun takes part.

    Args:
        source: what `open_source` takes.
        out: a new or empty folder, or one made by this function from the same source and configuration.
        config: what to make.
        progress: called after every batch with (done, total, "images").
        device: where the models run.

    Raises:
        UserError: a source, image, setting or disk that the user can mend; finished shards stay.
    """
    out = Path(out)
    images = open_source(source)
    settings = agree(out, Settings(source=images.identity, class_names=tuple(images.class_names), config=config))
    config, size = settings.config, settings.config.shard_size
    shards = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    models: dict[str, Callable[[], Group]] = {BASE: lambda: base_group(config, device)}
    models |= {spec: _loader(config, spec, config.weights_of(spec), device) for spec in config.features}

    def read(rows: range) -> Images:
        return _read_source(images, rows, config.resolution)

    return _fill(out, settings, shards, models, read, progress)


def add_features(
    out: str | Path,
    spec: str,
    *,
    weights: str | None = None,
    progress: Report | None = None,
    device: torch.device | str = "cpu",
) -> Manifest:
    """Add the tokens of one more encoder to a prepared folder, from its stored images: the source is not needed.

    Args:
        out: a folder made by `prepare`.
        spec: a name of ENCODERS or a dotted name.
        weights: local weights of that encoder; None for its own.
        progress: called after every batch with (done, total, "images").
        device: where the encoder runs.

    Raises:
        UserError: the folder holds no images, or the encoder cannot be loaded.
    """
    out = Path(out)
    manifest = Manifest.open(out)
    if not manifest.config.store_images:
        raise UserError(f"{out} holds no images to encode: run `repa prepare` on the source with --features {spec}.")
    config = manifest.config
    if spec not in config.features:
        config = config.override(features=(*config.features, spec))
    settings = agree(out, Settings(source=manifest.source, class_names=manifest.class_names, config=config))
    reader = ShardReader(out, manifest)
    shards = [range(int(end) - s.num, int(end)) for end, s in zip(reader.ends, manifest.shards, strict=True)]

    def read(rows: range) -> Images:
        indices = np.arange(rows.start, rows.stop)
        return Images(reader.gather("images", indices), reader.gather("labels", indices), [])

    return _fill(out, settings, shards, {spec: _loader(config, spec, weights, device)}, read, progress)


def _loader(config: PrepareConfig, spec: str, weights: str | None, device: torch.device | str) -> Callable[[], Group]:
    return lambda: feature_group(spec, weights, config, device)


def _fill(
    out: Path,
    settings: Settings,
    shards: Sequence[range],
    models: Mapping[str, Callable[[], Group]],
    read: Callable[[range], Images],
    report: Report | None,
) -> Manifest:
    """Finish every unfinished group of every shard, shard k by process k modulo their number; then the manifest."""
    _require_distinct_files(settings.config.features)
    finished = Progress(out)
    missing = {k: [name for name in models if finished.part(k, name) is None] for k in range(len(shards))}
    if finished.manifest and not any(missing.values()) and set(models) <= {BASE, *finished.manifest.features}:
        return finished.manifest
    groups = {name: load() for name, load in models.items() if any(name in names for names in missing.values())}
    for name, group in groups.items():
        for k in range(len(shards)):
            _require_same_model(out, group, finished.part(k, name))
    needed = sum(len(shards[k]) * groups[name].image_size for k, names in missing.items() for name in names)
    files.require_space(out, needed, f"Preparing {sum(map(len, shards)):,} images")

    dist.barrier()  # every process has read the folder before one changes it
    if dist.is_main():
        begin(out, settings)
    dist.barrier()
    mine = range(dist.rank(), len(shards), dist.world())
    work = {k: {name: groups[name] for name in missing[k]} for k in mine if missing[k]}
    _encode(out, shards, work, read, settings.config, report, total=sum(len(shards[k]) for k in mine))
    dist.barrier()
    return dist.from_main(assemble(out, settings, len(shards)) if dist.is_main() else None)


def _encode(
    out: Path,
    shards: Sequence[range],
    work: Mapping[int, Mapping[str, Group]],
    read: Callable[[range], Images],
    config: PrepareConfig,
    report: Report | None,
    total: int,
) -> None:
    """Stream images through the models into shard after shard; threads read ahead of the models."""
    size, threads = config.batch_size, config.num_workers
    batches = [(k, shards[k][at : at + size]) for k in work for at in range(0, len(shards[k]), size)]
    done = total - sum(len(rows) for _, rows in batches)
    finished = Progress(out)
    reading = ahead(lambda batch: (*batch, read(batch[1])), batches, depth=threads + 2, workers=threads)
    for k in (k for k in work if not shards[k]):  # a shard without images needs no model
        for name, group in work[k].items():
            finished.save(k, name, Part(shard=Shard(num=0, files={}), identity=group.identity))
    with contextlib.closing(reading):
        for k, stream in itertools.groupby(reading, key=lambda item: item[0]):
            bad: list[tuple[str, str]] = []
            with ShardWriter(out, k) as writer:
                for _, rows, images in stream:
                    bad += images.bad
                    if len(images.labels) and (config.skip_bad or not bad):
                        for group in work[k].values():
                            writer.append(group.encode(images))
                    done += len(rows)
                    if report:
                        report(done, total, "images")
                if bad and not config.skip_bad:
                    raise UserError(_refusal(bad, shards[k]))
            records = writer.records()
            for name, group in work[k].items():
                mine = {field: file for field, file in records.items() if is_of(field, name)}
                num = next((file.shape[0] for file in mine.values()), 0)
                shard = Shard(num=num, files=mine, skipped=tuple(image for image, _ in bad))
                finished.save(k, name, Part(shard=shard, identity=group.identity))


def _read_source(source: Source, rows: range, resolution: int) -> Images:
    pixels, kept, bad = [], [], []
    for index in rows:
        try:
            pixels.append(np.asarray(source.image(index, resolution)))
            kept.append(index)
        except UserError as error:
            bad.append((source.name(index), str(error)))
    if not kept:
        return Images(np.empty((0, 3, resolution, resolution), np.uint8), source.labels[:0], bad)
    return Images(np.ascontiguousarray(np.stack(pixels).transpose(0, 3, 1, 2)), source.labels[kept], bad)


def _refusal(bad: Sequence[tuple[str, str]], rows: range) -> str:
    return (
        f"{len(bad)} of the images {rows.start + 1:,} to {rows.stop:,} cannot be used. "
        f"The first: {bad[0][1].rstrip('.')}. Mend or remove them, or leave out all such images with --skip-bad."
    )


def _require_same_model(out: Path, group: Group, part: Part | None) -> None:
    changed = [key for key, value in group.identity.items() if part and part.identity.get(key) != value]
    if changed:
        raise UserError(
            f"The finished shards in {out} were made by another {group.identity['spec']} "
            f"(different: {', '.join(changed)}): give the same weights, or choose another folder."
        )


def _require_distinct_files(specs: Sequence[str]) -> None:
    names = [array_name(spec, 0) for spec in (BASE, *specs)]
    for spec, name in zip(specs, names[1:], strict=True):
        if names.count(name) > 1:
            raise UserError(f"The files of {spec!r} would be named like another's ({name}): leave one of the two out.")
