"""The work of a preparation: unfinished parts of shards -> images -> models -> files. Any number of processes share it."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from filelock import BaseFileLock

from repa.base import files, lock
from repa.base.errors import UserError
from repa.data.bases import basis_of, find_basis, lost_bases
from repa.data.groups import BASE, FeatureGroup, Group, fields_of
from repa.data.manifest import MANIFEST, PARTS, SETTINGS, Manifest, Shard
from repa.data.parts import Part, Progress, begin, finish, forget
from repa.data.prefetch import ahead
from repa.data.reading import Images, Piece, Planned, Read, cut
from repa.data.settings import Settings
from repa.data.shards import ShardWriter, array_name

Report = Callable[[int, int, str], None]  # done, total, note: images of this process
ENCODED = 3  # batches that wait for the disk
ATTEMPTS = 3


@dataclass(frozen=True)
class Job:
    """What is to be done in a folder, and this process's share of it: shard k for k modulo `world` equal to `rank`.

    Attributes:
        shards: all of them, in order.
        models: group -> how to load it; only these groups are made now.
        read: pieces -> their images.
    """

    out: Path
    settings: Settings
    shards: Sequence[Planned]
    models: Mapping[str, Callable[[], Group]]
    read: Read
    device: torch.device
    rank: int = 0
    world: int = 1
    report: Report | None = None
    held: dict[tuple[int, str], BaseFileLock] = field(default_factory=dict)  # locks of this process

    @property
    def share(self) -> range:
        return range(self.rank, len(self.shards), self.world)


def fill(job: Job) -> Manifest | None:
    """Finish this process's share; then the manifest, if that was the last one. None: others have work left."""
    for _ in range(ATTEMPTS):
        try:
            return _fill(job)
        except (FileNotFoundError, FileExistsError):  # parts/, which another process has just removed: all is finished
            if not (job.out / MANIFEST).is_file():
                raise
    return _fill(job)


def _fill(job: Job) -> Manifest | None:
    out, finished = job.out, Progress(job.out)
    _require_distinct_files(job.settings.config.features)
    missing = {k: [name for name in job.models if finished.part(k, name) is None] for k in range(len(job.shards))}
    lost = lost_bases(out, finished.manifest, job.models)
    if (
        finished.manifest
        and not lost
        and not any(missing.values())
        and set(job.models) <= {BASE, *finished.manifest.features}
    ):
        if (out / PARTS).is_dir():  # left by a kill, or another process adds an encoder
            return finish(out, job.settings, len(job.shards)) or finished.manifest
        forget(out)
        return finished.manifest
    mine = {k: missing[k] for k in job.share if missing[k]}
    groups = {
        name: load() for name, load in job.models.items() if any(name in names for names in (lost, *mine.values()))
    }
    _require_same_models(finished, groups, len(job.shards))
    needed = sum(
        len(job.shards[k].rows) * sum(groups[name].sizes.values()) for k, names in mine.items() for name in names
    )
    files.require_space(out, needed, f"Preparing {sum(len(job.shards[k].rows) for k in mine):,} images")
    begin(out, job.settings)
    for spec, group in groups.items():
        if isinstance(group, FeatureGroup) and group.num_directions:
            find = functools.partial(find_basis, group, job.read, job.shards)
            group.use_basis(*basis_of(out, spec, find))
            _require_same_models(finished, {spec: group}, len(job.shards))
    try:
        _write(job, groups, mine)
    finally:
        for key in list(job.held):
            lock.release(job.held.pop(key))
    return finish(out, job.settings, len(job.shards))


def _claims(
    job: Job, groups: Mapping[str, Group], mine: Mapping[int, Sequence[str]], passed: Callable[[int], None]
) -> Iterator[Piece]:
    """Pieces of the shards that this process can claim, each shard claimed as its first piece is asked for."""
    finished = Progress(job.out)
    for k in mine:
        taken = {name: handle for name in mine[k] if (handle := finished.claim(k, name)) is not None}
        if not (job.out / PARTS / SETTINGS).is_file():  # others have finished everything meanwhile
            finished = Progress(job.out)
        for name in [name for name in taken if finished.part(k, name) is not None]:  # by another process, since
            lock.release(taken.pop(name))
        job.held.update({(k, name): handle for name, handle in taken.items()})
        if taken and not job.shards[k].rows:  # a shard without images needs no model
            for name in taken:
                finished.save(k, name, Part(shard=Shard(num=0, files={}), identity=groups[name].identity))
        if taken and job.shards[k].rows:
            yield from cut(k, job.shards[k], job.settings.config.batch_size)
        else:
            passed(len(job.shards[k].rows))


def _write(job: Job, groups: Mapping[str, Group], mine: Mapping[int, Sequence[str]]) -> None:
    """Stream images through the models into shard after shard; workers read ahead, one thread encodes, this one writes."""
    total = sum(len(job.shards[k].rows) for k in job.share)
    counter = Counter(job.report, total, total - sum(len(job.shards[k].rows) for k in mine))
    config, finished = job.settings.config, Progress(job.out)

    def encode(item: tuple[Piece, Images]) -> tuple[Piece, Images, dict[str, np.ndarray]]:
        piece, images = item
        fields = {}
        if len(images.labels) and (config.skip_bad or not images.bad):
            for name, group in groups.items():
                if (piece.shard, name) in job.held:
                    fields |= group.encode(images)
        return piece, images, fields

    pieces = _claims(job, groups, mine, counter.pass_by)
    on_start = functools.partial(torch.cuda.set_device, job.device) if job.device.type == "cuda" else None
    with (
        contextlib.closing(job.read(pieces)) as reading,
        contextlib.closing(ahead(encode, reading, depth=ENCODED, on_start=on_start)) as encoded,
    ):
        for k, stream in itertools.groupby(encoded, key=lambda item: item[0].shard):
            names = [name for shard, name in job.held if shard == k]
            _write_shard(job, k, names, stream, counter, groups, finished)
            for name in names:
                lock.release(job.held.pop((k, name)))


def _write_shard(
    job: Job, k: int, names: Sequence[str], stream: Iterator[tuple[Piece, Images, dict[str, np.ndarray]]],
    counter: "Counter", groups: Mapping[str, Group], finished: Progress,
) -> None:  # fmt: skip
    planned, bad = job.shards[k], []
    with ShardWriter(job.out, k, expected=len(planned.rows)) as writer:
        for piece, images, fields in stream:
            bad += images.bad
            if fields:
                writer.append(fields, images.captions if BASE in names else ())
            counter.add(len(piece.rows), sum(rows.nbytes for rows in fields.values()))
        if bad and not job.settings.config.skip_bad:
            raise UserError(_refusal(bad, planned.rows))
    records, captions = writer.records(), writer.captions()
    for name in names:
        mine = {field: file for field, file in records.items() if field in fields_of(name)}
        shard = Shard(
            num=next((file.shape[0] for file in mine.values()), 0), files=mine, flipped=planned.flipped,
            captions=captions if name == BASE else None, skipped=tuple(image for image, _ in bad),
        )  # fmt: skip
        finished.save(k, name, Part(shard=shard, identity=groups[name].identity))


class Counter:
    """Images done and bytes written, told to whoever wants to know."""

    def __init__(self, report: Report | None, total: int, done: int):
        self.report, self.total, self.done, self.num_bytes = report, total, done, 0

    def add(self, images: int, num_bytes: int) -> None:
        self.done, self.num_bytes = self.done + images, self.num_bytes + num_bytes
        if self.report:
            self.report(self.done, self.total, f"{files.size(self.num_bytes)} written")

    def pass_by(self, images: int) -> None:
        """Images that another process has done meanwhile, or is at."""
        self.done += images


def _refusal(bad: Sequence[tuple[str, str]], rows: range) -> str:
    return (
        f"{len(bad)} of the images {rows.start + 1:,} to {rows.stop:,} cannot be used. "
        f"The first: {bad[0][1].rstrip('.')}. Mend or remove them, or leave out all such images with --skip-bad."
    )


def _require_same_models(finished: Progress, groups: Mapping[str, Group], num_shards: int) -> None:
    for name, group in groups.items():
        for k in range(num_shards):
            part = finished.part(k, name)
            changed = [key for key, value in group.identity.items() if part and part.identity.get(key) != value]
            if changed:
                raise UserError(
                    f"The finished shards in {finished.out} were made by another {group.identity['spec']} "
                    f"(different: {', '.join(changed)}): give the same weights, or choose another folder."
                )


def _require_distinct_files(specs: Sequence[str]) -> None:
    names = [array_name(spec, 0) for spec in (BASE, *specs)]
    for spec, name in zip(specs, names[1:], strict=True):
        if names.count(name) > 1:
            raise UserError(f"The files of {spec!r} would be named like another's ({name}): leave one of the two out.")
