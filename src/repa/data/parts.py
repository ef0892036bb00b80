"""Preparation in progress: what was asked, which parts of which shards are finished, and the manifest made of them.

A shard is finished in groups: "base" (images, labels, moments, captions), one for each encoder, and "text". A group counts once
its record is written, after its files; so a kill costs at most one shard, and encoders can be added to finished shards.
Processes meet only in these files: none waits for another but while a basis is found or a manifest written.
"""

import contextlib
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from filelock import BaseFileLock

from repa.base import files, lock
from repa.base.arrays import load_npy
from repa.base.config import Config
from repa.base.errors import UserError
from repa.data.bases import basis_name
from repa.data.config import split_format
from repa.data.groups import BASE, TEXT, fields_of
from repa.data.manifest import MANIFEST, PARTS, SETTINGS, FeatureField, Manifest, Shard, TextField
from repa.data.settings import Settings, read_record, started
from repa.data.shards import array_name, captions_name, record_of


class Part(Config):
    """One group of one shard, finished."""

    shard: Shard
    """Its files."""
    identity: dict[str, Any]
    """The model that made them."""


class Progress:
    """The finished parts of a folder: from its manifest when it was complete before, else from parts/."""

    def __init__(self, out: Path):
        self.out = out
        self.manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None

    def path(self, shard: int, group: str, suffix: str = ".json") -> Path:
        return (self.out / PARTS / array_name(group, shard)).with_suffix(suffix)

    def part(self, shard: int, group: str) -> Part | None:
        """The record of a finished group whose files are all there, else None."""
        path = self.path(shard, group)
        if (values := read_record(path)) is not None:
            part = Part.parse(values, where=str(path))
        elif self.manifest and group == TEXT and self.manifest.text and shard < len(self.manifest.shards):
            whole = self.manifest.shards[shard]
            shard_of = Shard(num=whole.num, files={}, flipped=whole.flipped, text=whole.text)
            part = Part(shard=shard_of, identity=self.manifest.text.identity)
        elif self.manifest and group in (BASE, *self.manifest.features) and shard < len(self.manifest.shards):
            whole = self.manifest.shards[shard]
            mine = {field: file for field, file in whole.files.items() if field in fields_of(group)}
            identity = self.manifest.autoencoder if group == BASE else self.manifest.features[group].identity
            shard_of = whole.override(files=mine, captions=whole.captions if group == BASE else None, text={})
            part = Part(shard=shard_of, identity=identity)
        else:
            return None
        return part if all(file.intact(self.out) for file in part.shard.records) else None

    def save(self, shard: int, group: str, part: Part) -> None:
        files.write_json(self.path(shard, group), part.model_dump(mode="json"))

    def claim(self, shard: int, group: str) -> BaseFileLock | None:
        """Lock a part for this process; None when another is at it. What a killed one left of it is removed."""
        handle = lock.take(self.path(shard, group, ".lock"))
        if handle is not None:
            names = [array_name(field, shard) for field in fields_of(group)]
            for name in [*names, *([captions_name(shard)] if group == BASE else [])]:
                for path in self.out.glob(f".{name}.*.tmp"):
                    path.unlink()
        return handle


def begin(out: Path, settings: Settings) -> None:
    """Write down what is asked, before any work."""
    files.write_json(out / PARTS / SETTINGS, settings.model_dump(mode="json"))


def finish(out: Path, settings: Settings, num_shards: int) -> Manifest | None:
    """Make the manifest of all parts and forget them; None while some are unfinished. Any process may call it."""
    with lock.held(out / PARTS / "finish.lock"):
        now = started(out) or settings  # others may have asked for more encoders meanwhile
        progress = Progress(out)
        stored = progress.manifest.features if progress.manifest else ()
        names = dict.fromkeys([*now.config.features, *settings.config.features, *stored])
        groups = (BASE, *names, *([TEXT] if now.config.text or settings.config.text else []))
        parts = [{group: progress.part(k, group) for group in groups} for k in range(num_shards)]
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
        assert len({part.shard.num for part in shard.values()}) == 1, f"shard {number} differs in length: {shard}"
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
    names = [group for group in first if group not in (BASE, TEXT)]
    return Manifest(
        source=settings.source,
        config=settings.config,
        num_images=sum(shard.num for shard in shards),
        class_names=settings.class_names,
        class_counts=tuple(int(count) for count in counts),
        inventory=settings.inventory.override(captioned=_captioned(out, shards)),
        autoencoder=first[BASE].identity,
        features={name: _facts(out, name, settings.config.form_of(name), first[name]) for name in names},
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
    basis = record_of(out / basis_name(name)) if split_format(form)[0] else None
    return FeatureField(
        dim=basis.shape[1] if basis else dim,
        grid=math.isqrt(tokens),
        pooled=f"pooled.{name}" in part.shard.files,
        form=form,
        basis=basis,
        identity=part.identity,
    )
