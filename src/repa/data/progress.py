"""Progress of a preparation: the settings of a folder, and the finished parts of its shards.

A shard has the parts "base" (images, labels, moments, captions), one per encoder, and "text". A part is finished when
its record in parts/ exists, which is written last: a kill costs at most one shard, and encoders can be added later.
Processes share only these files. pipeline.py reads them before and after its work. Torch-free.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repa.base import files
from repa.base.config import Config, difference
from repa.base.errors import UserError, choices
from repa.data.config import BASE, FP16, TEXT, PrepareConfig, array_name
from repa.data.manifest import MANIFEST, PARTS, SETTINGS_FILE, Manifest, Settings
from repa.data.records import Shard, fields_of

# weights are compared by their checksums and labels by that of the source: a copy elsewhere is the same
MAY_CHANGE = (
    "batch_size", "num_workers", "skip_bad", "labels", "autoencoder_weights", "feature_weights", "text_weights",
)  # fmt: skip
MOST_SHOWN = 100  # characters: longer differences (a thousand class names) are reported by field only


class Part(Config):
    """One part of one shard, finished."""

    shard: Shard
    """Its files."""
    identity: dict[str, Any]
    """Identity of the model."""


def merge_settings(out: Path, requested: Settings) -> Settings:
    """The settings for `out`: the requested ones, plus encoders and text encoder requested earlier.

    Raises UserError for a folder with other contents, or with data of another source or configuration.
    """
    stored = started(out)
    if stored is None:
        return requested
    old, new = stored.config, requested.config
    # not by `difference`: each call names only its own encoders, so the lists of forms may differ without a conflict
    both = [name for name in new.features if name in old.features]
    forms = [(name, *(config.feature_forms.get(name, FP16) for config in (old, new))) for name in both]
    lines = [f"feature_forms of {name}: {was} -> {now}" for name, was, now in forms if was != now]
    if old.text and not new.text:
        new = new.override(text=old.text, text_form=old.text_form, text_weights=new.text_weights or old.text_weights)
    features = tuple(dict.fromkeys([*old.features, *new.features]))
    new = new.override(features=features, feature_forms={**new.feature_forms, **old.feature_forms})
    added = () if old.text else ("text", "text_form")
    same = {name: getattr(new, name) for name in (*MAY_CHANGE, *added, "features", "feature_forms")}
    merged = requested.override(config=new)
    before = stored.override(config=old.override(**same), inventory=merged.inventory)
    changes = difference(before, merged)
    lines += [line if len(line) <= MOST_SHOWN else f"other {line.partition(':')[0]}" for line in changes]
    # Settings are named as options are, without the part of the record that holds them.
    lines = [line.removeprefix("config.") for line in lines]
    if lines:
        raise UserError(
            f"{out} holds data of another source or with other settings ({'; '.join(lines[:5])}): "
            "choose another folder, repeat its settings, or delete it first."
        )
    return merged


def chosen_parts(only: Sequence[str], config: PrepareConfig) -> list[str]:
    """The parts in `only`, or all; raises UserError for a part that `config` lacks."""
    features, text = [f"features:{spec}" for spec in config.features], [TEXT] if config.text else []
    allowed = [BASE, *features, *text]
    for name in only:
        if name not in allowed:
            raise UserError(f"only is {name!r}{choices(name, allowed)}")
    return [name.removeprefix("features:") for name in allowed if not only or name in only]


def started(out: Path) -> Settings | None:
    """The settings in `out`; None for a new folder; UserError for other contents."""
    files.refuse_links(out)
    settings = out / PARTS / SETTINGS_FILE
    if (values := _read_record(settings)) is not None:
        return Settings.parse(values, where=str(settings))
    if (out / MANIFEST).is_file():
        return Manifest.open(out).settings()
    known = (PARTS, "lock")
    if out.exists() and not (out.is_dir() and all(path.name.lstrip(".").startswith(known) for path in out.iterdir())):
        raise UserError(f"{out} is not empty and holds no prepared data: choose another folder.")
    return None


def _read_record(path: Path) -> Any:
    """A file of parts/; None if it does not exist."""
    # another process may finish the folder and remove parts/ before the file is read
    try:
        return files.read_json(path) if path.is_file() else None
    except UserError:
        if path.is_file():
            raise
        return None


class PlannedShard(NamedTuple):
    """A shard to make from images of the source, or from stored images."""

    indices: range
    """Of its images in the source or in the folder; for captions within the shard; of the originals for a mirrored copy."""
    flipped: bool = False
    is_ready: bool = True  # False: another process has not stored its images yet


class Piece(NamedTuple):
    """Images of one shard that are read and encoded together."""

    shard: int
    indices: range
    flipped: bool
    parts: tuple[str, ...] = ()  # that are made of it


def plan_shards(num_images: int, size: int, flip: bool) -> list[PlannedShard]:
    """Shards of `size` images; with `flip` mirrored copies of all of them follow."""
    ranges = [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]
    return [PlannedShard(each, flipped) for flipped in ((False, True) if flip else (False,)) for each in ranges]


class FinishedParts:
    """The finished parts of a folder now: from its manifest if it was complete before, else from parts/.

    Attributes:
        settings: from `merge_settings`, whose errors it raises.
        manifest: of the folder as it was complete before, or None.
        names: all parts of a shard of this folder.
        parts: for each shard, the finished parts.
    """

    def __init__(self, out: Path, requested: Settings, num_shards: int):
        self.out, self.settings = out, merge_settings(out, requested)
        self.manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None
        config, stored = self.settings.config, self.manifest.features if self.manifest else {}
        self.names = (BASE, *dict.fromkeys([*config.features, *stored]), *([TEXT] if config.text else []))
        self.parts = [
            {name: part for name in self.names if (part := finished_part(out, self.manifest, k, name))}
            for k in range(num_shards)
        ]


def finished_part(out: Path, manifest: Manifest | None, shard: int, name: str) -> Part | None:
    """A finished part with all its files, else None."""
    # parts/ first: if both exist, it is newer than the manifest
    path = record_path(out, shard, name)
    if (values := _read_record(path)) is not None:
        part: Part | None = Part.parse(values, where=str(path))
    else:
        part = _of_manifest(manifest, shard, name) if manifest else None
    return part if part and all(file.intact(out) for file in part.shard.records) else None


def record_path(out: Path, shard: int, name: str) -> Path:
    """Path of the record of a part in an unfinished folder."""
    return (out / PARTS / array_name(name, shard)).with_suffix(".json")


def _of_manifest(manifest: Manifest, shard: int, name: str) -> Part | None:
    if shard >= len(manifest.shards) or name not in manifest.parts:
        return None
    stored = manifest.shards[shard]
    if name == TEXT:
        assert manifest.text is not None
        return Part(shard=stored.override(files={}, captions=None, skipped=()), identity=manifest.text.identity)
    files_of_part = {field: file for field, file in stored.files.items() if field in fields_of(name)}
    part = stored.override(files=files_of_part, captions=stored.captions if name == BASE else None, text={})
    return Part(shard=part, identity=manifest.autoencoder if name == BASE else manifest.features[name].identity)
