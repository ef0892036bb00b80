"""Run one job of a preparation: read, encode and write the missing parts of a folder, then finish it."""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch

from repa.base import files, lock
from repa.base.ahead import by_threads
from repa.base.device import checked_device
from repa.data.encoding import FeatureFields, encode, load_models, require_same_model
from repa.data.finishing import finish
from repa.data.manifest import PARTS, SETTINGS_FILE, Manifest, remove_parts
from repa.data.progress import FinishedParts, PlannedShard
from repa.data.reading import Read, claimed
from repa.data.writing import Counter, Report, write_shard

ENCODED = 3  # batches that wait for the disk


class Execution(TypedDict, total=False):
    """How to run a call; the default is one process on the CPU without reports."""

    rank: int
    """Index of this process, which makes the shards k with k % world == rank."""
    world: int
    """Number of processes that share the work."""
    progress: Report | None
    """Called after every batch with (done, total, note): the images of this process, and the bytes written."""
    device: torch.device | str
    """Device of the models."""


@dataclass(frozen=True)
class Job:
    """The work to do in a folder.

    Attributes:
        finished: the parts that the folder has.
        shards: all shards, in order.
        parts: the parts to make.
        read: pieces -> their images.
    """

    finished: FinishedParts
    shards: Sequence[PlannedShard]
    parts: Sequence[str]
    read: Read


def run(job: Job, **execution: Unpack[Execution]) -> Manifest | None:
    """Make this process's share, then the manifest if everything is finished; None while others still work."""
    before, out, settings = job.finished.manifest, job.finished.out, job.finished.settings
    missing = {k: [name for name in job.parts if name not in there] for k, there in enumerate(job.finished.parts)}
    # a lost basis is computed again, because the tokens' coordinates in it are still stored
    stored = before.features if before else {}
    lost = [n for n in job.parts if n in stored and (basis := stored[n].basis) and not basis.intact(out)]
    is_done = before is not None and not lost and not any(missing.values()) and set(job.parts) <= before.parts
    if not is_done:
        _make_shards(job, missing, lost, **execution)
    elif not (out / PARTS).is_dir():
        remove_parts(out)
        return before
    # several processes may be last at the same time: one writes the manifest, and the others find it
    with lock.held(out / PARTS / "finish.lock"):
        now = FinishedParts(out, settings, len(job.shards))
        if all(len(there) == len(now.names) for there in now.parts):
            # two calls that began at the same time could not compare their models before
            for name, part in now.parts[0].items():
                require_same_model(now, name, part.identity)
            return finish(now)
    return before if is_done else None  # parts/ belongs to a process that adds another encoder


def _make_shards(
    job: Job, missing: Mapping[int, Sequence[str]], lost: Sequence[str],
    *, rank: int = 0, world: int = 1, progress: Report | None = None, device: torch.device | str = "cpu",
) -> None:  # fmt: skip
    """Make the missing parts of this process's shards, and lost bases."""
    out, config, device = job.finished.out, job.finished.settings.config, checked_device(device)
    share = range(rank, len(job.shards), world)
    todo = {k: missing[k] for k in share if missing[k] and job.shards[k].is_ready}
    # Only the needed models, before the first image, so that wrong weights are reported at once.
    needed = {*lost, *itertools.chain(*todo.values())}
    models = load_models(job.finished, [name for name in job.parts if name in needed], device)
    nums = [len(planned.indices) for planned in job.shards]
    num_todo, total = sum(nums[k] for k in todo), sum(nums[k] for k in share)
    size = sum(nums[k] * sum(models[name].sizes.values()) for k, names in todo.items() for name in names)
    files.require_space(out, size, f"Preparing {num_todo:,} images")
    files.write_sealed(out / PARTS / SETTINGS_FILE, job.finished.settings.model_dump(mode="json"))
    for name, model in models.items():
        if isinstance(model, FeatureFields) and model.num_directions:
            # after the settings are saved: a folder with a basis but no settings would be refused as foreign
            model.use_stored_basis(out, job.read, job.shards)
            require_same_model(job.finished, name, model.identity)

    # a pipeline of three: workers read, one thread encodes, and this thread writes, so that the device does not wait
    counter, claims = Counter(progress, total, total - num_todo), dict[int, list[int]]()
    on_start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pieces = claimed(out, job.shards, todo, claims, config.batch_size)
    encoding = functools.partial(encode, models=models, skip_bad=config.skip_bad)
    try:
        with (
            contextlib.closing(job.read(pieces)) as read,
            contextlib.closing(by_threads(encoding, read, depth=ENCODED, on_start=on_start)) as encoded,
        ):
            # batches come in the order of the shards, so only one shard is open at a time
            for (k, names), batches in itertools.groupby(encoded, key=lambda item: (item[0].shard, item[0].parts)):
                if names:
                    identities = {name: models[name].identity for name in names}
                    write_shard(out, k, job.shards[k], batches, identities, counter, skip_bad=config.skip_bad)
                else:  # another process has made it, or makes it now
                    counter.done += len(job.shards[k].indices)
                for handle in claims.pop(k):  # after the records; otherwise another process would make the parts again
                    lock.release(handle)
    finally:
        for handle in itertools.chain(*claims.values()):
            lock.release(handle)
