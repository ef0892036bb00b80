"""The captions of a prepared folder to tokens, shard by shard; the second pass of `prepare`, after that over the images.

Captions are read back from the folder, so their tokens are a function of its files and the text encoder alone. Shares, claims
and records are those of the first pass (data/filling.py, data/parts.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from repa.base import lock
from repa.base.errors import UserError
from repa.base.precision import DTYPES, HALF
from repa.conditions import TextEncoder, load_text_encoder
from repa.data.captions import lines_of, texts_of
from repa.data.groups import BASE, TEXT
from repa.data.manifest import Manifest, Shard
from repa.data.packing import pack
from repa.data.parts import Part, Progress, begin, finish
from repa.data.settings import Settings
from repa.data.shards import ShardWriter


@dataclass(frozen=True)
class TextJob:
    """What is to be done in a folder, and this process's share of it: shard k for k modulo `world` equal to `rank`."""

    out: Path
    settings: Settings
    num_shards: int
    device: torch.device
    rank: int = 0
    world: int = 1
    report: Callable[[int, int, str], None] | None = None


def encode_captions(job: TextJob) -> Manifest | None:
    """Finish this process's share; then the manifest, if that was the last one. None: others have work left."""
    finished, config = Progress(job.out), job.settings.config
    missing = [k for k in range(job.rank, job.num_shards, job.world) if finished.part(k, TEXT) is None]
    if missing:
        encoder = load_text_encoder(config.text, weights=config.text_weights or None, device=job.device)
        if config.precision in HALF:
            encoder.round_weights(DTYPES[config.precision])
        _require_same_encoder(finished, encoder, config.text, job.num_shards)
        begin(job.out, job.settings)
        for done, k in enumerate(missing):
            _claim_and_write(job, encoder, finished, k)
            if job.report:
                job.report(done + 1, len(missing), "captions, in shards")
    return finish(job.out, job.settings, job.num_shards)


def _claim_and_write(job: TextJob, encoder: TextEncoder, finished: Progress, k: int) -> None:
    """A shard, unless another process is at it or its images are not there yet."""
    base = finished.part(k, BASE)
    handle = finished.claim(k, TEXT) if base else None
    if handle is None:
        return
    try:
        if finished.part(k, TEXT) is None:
            finished.save(k, TEXT, Part(shard=_write(job, encoder, k, base.shard), identity=encoder.identity))
    finally:
        lock.release(handle)


def _write(job: TextJob, encoder: TextEncoder, k: int, base: Shard) -> Shard:
    """The files of one shard. Row 0 is the empty text, which an image without captions has; then caption after caption."""
    if base.flipped or not base.num:  # a flipped copy has the captions of its original
        return Shard(num=base.num, files={}, flipped=base.flipped)
    captions: Sequence[tuple[str, ...]] = [()] * base.num
    if base.captions:
        path = job.out / base.captions.file
        captions = [texts_of(line, row, path) for row, line in enumerate(lines_of(path, base.num))]
    texts = ["", *(text for of_image in captions for text in of_image)]
    counts = np.array([len(of_image) for of_image in captions], np.int64)
    first = np.where(counts, 1 + counts.cumsum() - counts, 0)
    rows = np.stack([first, np.maximum(counts, 1)], 1)  # (n, 2): the first row of an image's captions, and how many
    with (
        ShardWriter(job.out, k, expected=len(texts)) as of_captions,
        ShardWriter(job.out, k, expected=len(rows)) as of_images,
    ):
        for fields in _encoded(job, encoder, texts):
            of_captions.append(fields)
        of_images.append({"text_rows": rows})
    return Shard(num=base.num, files={}, text={**of_captions.records(), **of_images.records()})


def _encoded(job: TextJob, encoder: TextEncoder, texts: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
    """Field -> rows, a batch of texts at a time."""
    config = job.settings.config
    half = config.precision != "fp32"
    for start in range(0, len(texts), config.batch_size):
        with torch.autocast(job.device.type, dtype=DTYPES.get(config.precision), enabled=half):
            text = encoder(texts[start : start + config.batch_size])
        try:
            stored = pack(text.tokens, config.text_form)  # (n, S, E), (n, S)
        except UserError as error:
            raise UserError(f"{config.text} gave tokens that cannot be stored: {error}") from error
        fields = {"features": "text", "scale": "text_scale"}
        mask = {} if text.mask is None else {"text_mask": text.mask.to(torch.uint8).cpu().numpy()}
        yield {fields[name]: x.cpu().numpy() for name, x in stored.items()} | mask


def _require_same_encoder(finished: Progress, encoder: TextEncoder, spec: str, num_shards: int) -> None:
    for k in range(num_shards):
        part = finished.part(k, TEXT)
        changed = [key for key, value in encoder.identity.items() if part and part.identity.get(key) != value]
        if changed:
            raise UserError(
                f"The finished captions in {finished.out} were encoded by another {spec} (different: {', '.join(changed)}): give "
                f"the same weights, or remove them with `repa prepare {finished.out} --remove text`."
            )
