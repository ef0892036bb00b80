"""Preparation in progress: what was asked, which parts of which shards are finished, and the manifest made of them.

A shard is finished in groups: "base" (images, labels, moments) and one for each encoder. A group counts once its record
is written, after its files; so a kill costs at most one shard, and encoders can be added to finished shards.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from repa.base import files
from repa.base.config import Config, difference
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.manifest import MANIFEST, PARTS, SETTINGS, FeatureField, Manifest, Shard
from repa.data.shards import array_name, remove_leftovers

BASE = "base"
FREE = (
    "batch_size",
    "num_workers",
    "skip_bad",
    "autoencoder_weights",
    "feature_weights",
)  # may change: weights are compared by checksum


class Settings(Config):
    """What a folder is being prepared from and how: parts/settings.json."""

    source: dict[str, Any]
    """Identity of the source."""
    class_names: tuple[str, ...]
    """Its classes."""
    config: PrepareConfig
    """How it is prepared."""


class Part(Config):
    """One group of one shard, finished."""

    shard: Shard
    """Its files."""
    identity: dict[str, Any]
    """The model that made them."""


def is_of(field: str, group: str) -> bool:
    """Whether a field belongs to a group."""
    if group == BASE:
        return not field.startswith(("features.", "pooled."))
    return field in (f"features.{group}", f"pooled.{group}")


class Progress:
    """The finished parts of a folder: from its manifest when it was complete before, else from parts/."""

    def __init__(self, out: Path):
        self.out = out
        self.manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None

    def path(self, shard: int, group: str) -> Path:
        return (self.out / PARTS / array_name(group, shard)).with_suffix(".json")

    def part(self, shard: int, group: str) -> Part | None:
        """The record of a finished group whose files are all there, else None."""
        path = self.path(shard, group)
        if path.is_file():
            part = Part.parse(files.read_json(path), where=str(path))
        elif self.manifest and group in (BASE, *self.manifest.features) and shard < len(self.manifest.shards):
            whole = self.manifest.shards[shard]
            mine = {field: file for field, file in whole.files.items() if is_of(field, group)}
            identity = self.manifest.autoencoder if group == BASE else self.manifest.features[group].identity
            part = Part(shard=whole.override(files=mine), identity=identity)
        else:
            return None
        return part if all(file.intact(self.out) for file in part.shard.files.values()) else None

    def save(self, shard: int, group: str, part: Part) -> None:
        files.write_json(self.path(shard, group), part.model_dump(mode="json"))


def agree(out: Path, asked: Settings) -> Settings:
    """What to prepare in `out`: what is asked, plus encoders that were asked for before.

    Refuses a folder that holds other things, or data of another source or configuration.
    """
    before = _before(out)
    if before is None:
        return asked
    old, new = before.config, asked.config
    new = new.override(features=tuple(dict.fromkeys([*old.features, *new.features])))
    same = {name: getattr(new, name) for name in (*FREE, "features")}
    asked = Settings(source=asked.source, class_names=asked.class_names, config=new)
    if lines := difference(
        Settings(source=before.source, class_names=before.class_names, config=old.override(**same)), asked
    ):
        raise UserError(
            f"{out} holds data of another source or configuration ({'; '.join(lines[:5])}): "
            "choose another folder, or give the settings it was started with."
        )
    return asked


def _before(out: Path) -> Settings | None:
    """What `out` was started with; None when it is new."""
    settings = out / PARTS / SETTINGS
    if settings.is_file():
        return Settings.parse(files.read_json(settings), where=str(settings))
    if (out / MANIFEST).is_file():
        manifest = Manifest.open(out)
        return Settings(source=manifest.source, class_names=manifest.class_names, config=manifest.config)
    if out.exists() and not (out.is_dir() and all(path.name == PARTS for path in out.iterdir())):
        raise UserError(f"{out} is not an empty folder and holds no prepared data: choose another one.")
    return None


def begin(out: Path, settings: Settings) -> None:
    """Write down what is asked, before any work; the main process alone does it."""
    remove_leftovers(out)
    files.write_json(out / PARTS / SETTINGS, settings.model_dump(mode="json"))


def assemble(out: Path, settings: Settings, num_shards: int) -> Manifest:
    """Make the manifest of all finished parts, then forget the parts."""
    progress = Progress(out)
    names = dict.fromkeys([*settings.config.features, *(progress.manifest.features if progress.manifest else ())])
    shards, first = [], None
    for number in range(num_shards):
        parts = {group: progress.part(number, group) for group in (BASE, *names)}
        assert all(parts.values()), f"shard {number} is not finished: {parts}"
        assert len({part.shard.num for part in parts.values()}) == 1, f"shard {number} differs in length: {parts}"
        merged = {field: file for part in parts.values() for field, file in part.shard.files.items()}
        shards.append(parts[BASE].shard.override(files=merged))
        first = first or (parts if shards[-1].num else None)
    if first is None:
        raise UserError(f"No image of {settings.source['name']} can be used; the first is {shards[0].skipped[0]}.")
    counts = np.zeros(len(settings.class_names), np.int64)
    for shard in shards:
        if shard.num:
            counts += np.bincount(np.load(out / shard.files["labels"].file, allow_pickle=False), minlength=len(counts))
    manifest = Manifest(
        source=settings.source,
        config=settings.config,
        num_images=sum(shard.num for shard in shards),
        class_names=settings.class_names,
        class_counts=tuple(int(count) for count in counts),
        autoencoder=first[BASE].identity,
        features={name: _facts(name, first[name]) for name in names},
        shards=tuple(shards),
    )
    manifest.save(out)
    shutil.rmtree(out / PARTS)
    return manifest


def _facts(name: str, part: Part) -> FeatureField:
    _, tokens, dim = part.shard.files[f"features.{name}"].shape
    return FeatureField(
        dim=dim, grid=math.isqrt(tokens), pooled=f"pooled.{name}" in part.shard.files, identity=part.identity
    )
