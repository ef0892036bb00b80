"""The manifest of a folder, made of its finished parts."""

import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from repa.base import files, lock
from repa.base.arrays import load_npy
from repa.base.errors import UserError
from repa.data.config import split_format
from repa.data.manifest import MANIFEST, PARTS, FeatureField, Manifest, TextField
from repa.data.progress import Part, Progress, Settings, started
from repa.data.stored_files import BASE, TEXT, ArrayFile, Shard, basis_name


def finish(out: Path, settings: Settings, num_shards: int) -> Manifest | None:
    """Make the manifest of all parts and forget them; None while some are unfinished. Any process may call it."""
    with lock.held(out / PARTS / "finish.lock"):
        now = started(out) or settings  # others may have asked for more encoders meanwhile
        progress = Progress(out)
        stored = progress.manifest.features if progress.manifest else ()
        encoders = dict.fromkeys([*now.config.features, *settings.config.features, *stored])
        names = (BASE, *encoders, *([TEXT] if now.config.text or settings.config.text else []))
        parts = [{name: progress.part(k, name) for name in names} for k in range(num_shards)]
        if not all(part for shard in parts for part in shard.values()):
            return None
        manifest = _assemble(out, now, parts)
        if manifest != progress.manifest:
            manifest.save(out)
        forget(out)
    return manifest


def forget(out: Path) -> None:
    """Remove parts/, which goes at once, and what killed processes left of the folder's own files."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(out / PARTS, tempfile.mkdtemp(prefix=f".{PARTS}.", suffix=".tmp", dir=out))
    for path in out.glob(f".{PARTS}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it
    for pattern in (f".{MANIFEST}.*.tmp", ".basis.*.tmp"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _assemble(out: Path, settings: Settings, parts: list[dict[str, Part]]) -> Manifest:
    shards, first = [], None
    for number, shard in enumerate(parts):
        nums = {part.shard.num for name, part in shard.items() if name != TEXT}
        assert len(nums) == 1, f"shard {number} differs in length: {shard}"
        merged = {field: file for part in shard.values() for field, file in part.shard.files.items()}
        text = shard[TEXT].shard.text if TEXT in shard else {}
        shards.append(shard[BASE].shard.override(files=merged, text=text))
        first = first or (shard if shards[-1].num else None)
    if first is None:
        raise UserError(f"No image of {settings.source['name']} can be used; the first is {shards[0].skipped[0]}.")
    counts = np.zeros(len(settings.class_names), np.int64)
    for shard in shards:
        if shard.num and not shard.flipped:
            counts += np.bincount(load_npy(out / shard.files["labels"].file, "labels"), minlength=len(counts))
    encoders = [name for name in first if name not in (BASE, TEXT)]
    return Manifest(
        source=settings.source,
        config=settings.config,
        num_images=sum(shard.num for shard in shards),
        class_names=settings.class_names,
        class_counts=tuple(int(count) for count in counts),
        inventory=settings.inventory.override(captioned=_captioned(out, shards)),
        autoencoder=first[BASE].identity,
        features={name: _facts(out, name, settings.config.form_of(name), first[name]) for name in encoders},
        text=_text_facts(settings.config.text_form, first[TEXT]) if TEXT in first else None,
        shards=tuple(shards),
    )


def _text_facts(form: str, part: Part) -> TextField:
    """Of a shard with images, so that it has captions or at least the empty text."""
    _, num_tokens, dim = part.shard.text["text"].shape
    masked = "text_mask" in part.shard.text
    return TextField(dim=dim, num_tokens=num_tokens, masked=masked, form=form, identity=part.identity)


def _captioned(out: Path, shards: list[Shard]) -> int | None:
    """Images that have captions, among the originals; None where no shard has a file of them."""
    files_of = [shard.captions.file for shard in shards if shard.captions and not shard.flipped]
    lines = [line for file in files_of for line in (out / file).read_bytes().splitlines()]
    return sum(line != b"[]" for line in lines) if files_of else None


def _facts(out: Path, name: str, form: str, part: Part) -> FeatureField:
    _, tokens, dim = part.shard.files[f"features.{name}"].shape
    basis = _record_of(out / basis_name(name)) if split_format(form)[0] else None
    return FeatureField(
        dim=basis.shape[1] if basis else dim,
        grid=math.isqrt(tokens),
        pooled=f"pooled.{name}" in part.shard.files,
        form=form,
        basis=basis,
        identity=part.identity,
    )


def _record_of(path: Path) -> ArrayFile:
    array = load_npy(path, "an array")
    return ArrayFile(
        file=path.name, dtype=str(array.dtype), shape=array.shape, size=path.stat().st_size, sha256=files.sha256(path)
    )
