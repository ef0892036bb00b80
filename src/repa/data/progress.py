"""Preparation in progress: what is asked of a folder, and which parts of which shards are finished.

A shard is finished in parts: "base" (images, labels, moments, captions), one for each encoder, and "text". A part counts once
its record in parts/ is written, after its files; so a kill costs at most one shard, and encoders can be added to finished shards.
Processes share only these files: one waits for another only while a basis is computed or a manifest is written. Free of torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from filelock import BaseFileLock

from repa.base import files, lock
from repa.base.config import Config, difference
from repa.base.errors import UserError, choices
from repa.data.config import PrepareConfig
from repa.data.manifest import MANIFEST, PARTS, SETTINGS_FILE, Inventory, Manifest
from repa.data.stored_files import BASE, TEXT, Shard, array_name, captions_name, fields_of

# weights are compared by their checksums and labels by that of the source: a copy elsewhere is the same
MAY_CHANGE = (
    "batch_size", "num_workers", "skip_bad", "labels", "autoencoder_weights", "feature_weights", "text_weights",
)  # fmt: skip
MOST_SHOWN = 100  # characters: of longer differences (a thousand class names) only the field is named


class Settings(Config):
    """What a folder is being prepared from and how: parts/settings.json."""

    source: dict[str, Any]
    """Identity of the source."""
    class_names: tuple[str, ...]
    """Its classes."""
    config: PrepareConfig
    """How it is prepared."""
    inventory: Inventory = Inventory()
    """What was found in the source, for reports."""

    @classmethod
    def of(cls, manifest: Manifest, config: PrepareConfig) -> Self:
        """The settings of a finished folder, with another configuration."""
        names, inventory = manifest.class_names, manifest.inventory
        return cls(source=manifest.source, class_names=names, config=config, inventory=inventory)

    def save(self, out: Path) -> None:
        """Write parts/settings.json, before any work."""
        files.write_json(out / PARTS / SETTINGS_FILE, self.model_dump(mode="json"))


class Part(Config):
    """One part of one shard, finished."""

    shard: Shard
    """Its files."""
    identity: dict[str, Any]
    """The model that made them."""


def merge_settings(out: Path, asked: Settings) -> Settings:
    """What to prepare in `out`: what is asked, plus encoders and the text encoder that were asked for before.

    Raises UserError for a folder that holds other things, or data of another source or configuration.
    """
    before = started(out)
    if before is None:
        return asked
    old, new = before.config, asked.config
    # not by `difference`: each call names only its own encoders, so that the two lists of forms differ without a conflict
    both = [name for name in new.features if name in old.features]
    lines = [
        f"config.feature_forms of {name}: {old.form_of(name)} -> {new.form_of(name)}"
        for name in both
        if old.form_of(name) != new.form_of(name)
    ]
    forms = [f"{name}={old.form_of(name)}" for name in old.features]
    forms += [f"{name}={new.form_of(name)}" for name in new.features if name not in both]
    if old.text and not new.text:
        new = new.override(text=old.text, text_form=old.text_form, text_weights=new.text_weights or old.text_weights)
    new = new.override(features=tuple(dict.fromkeys([*old.features, *new.features])), feature_forms=tuple(forms))
    added = () if old.text else ("text", "text_form")
    same = {name: getattr(new, name) for name in (*MAY_CHANGE, *added, "features", "feature_forms")}
    asked = asked.override(config=new)
    was = before.override(config=old.override(**same), inventory=asked.inventory)
    lines += [line if len(line) <= MOST_SHOWN else f"other {line.partition(':')[0]}" for line in difference(was, asked)]
    if lines:
        raise UserError(
            f"{out} holds data of another source or configuration ({'; '.join(lines[:5])}): "
            "choose another folder, or give the settings it was started with."
        )
    return asked


def chosen_parts(only: Sequence[str], config: PrepareConfig) -> list[str]:
    """The parts that `only` names, or all; raises UserError for a name that is not one of `config`'s."""
    features, text = [f"features:{spec}" for spec in config.features], [TEXT] if config.text else []
    allowed = [BASE, *features, *text]
    for name in only:
        if name not in allowed:
            raise UserError(f"only was given {name!r}{choices(name, allowed)}")
    return [name.removeprefix("features:") for name in allowed if not only or name in only]


def started(out: Path) -> Settings | None:
    """The settings that `out` was begun with; None when it is new; UserError when it holds other things."""
    settings = out / PARTS / SETTINGS_FILE
    if (values := _read_record(settings)) is not None:
        return Settings.parse(values, where=str(settings))
    if (out / MANIFEST).is_file():
        manifest = Manifest.open(out)
        return Settings.of(manifest, manifest.config)
    own = (PARTS, "lock")
    if out.exists() and not (out.is_dir() and all(path.name.lstrip(".").startswith(own) for path in out.iterdir())):
        raise UserError(f"{out} is not an empty folder and holds no prepared data: choose another one.")
    return None


def _read_record(path: Path) -> Any:
    """A file of parts/; None when it is not there."""
    # another process may finish the folder, and remove parts/, between the look and the reading
    try:
        return files.read_json(path) if path.is_file() else None
    except UserError:
        if path.is_file():
            raise
        return None


class PlannedShard(NamedTuple):
    """A shard to be made: rows of the source, or of the stored images."""

    rows: range
    flipped: bool = False
    is_ready: bool = True  # False: what it is made from is not stored yet, by another process


class Piece(NamedTuple):
    """Images of one shard that are read and encoded at a time."""

    shard: int
    rows: range
    flipped: bool
    parts: tuple[str, ...] = ()  # that are made of it


def plan_shards(num_images: int, size: int, flip: bool) -> list[PlannedShard]:
    """Shards of `size` images; with `flip` mirrored copies of all of them follow."""
    ranges = [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]
    return [PlannedShard(rows, flipped) for flipped in ((False, True) if flip else (False,)) for rows in ranges]


class FinishedParts:
    """The finished parts of a folder: from its manifest when it was complete before, else from parts/."""

    def __init__(self, out: Path):
        self.out = out
        self.manifest = Manifest.open(out) if (out / MANIFEST).is_file() else None

    def part(self, shard: int, name: str) -> Part | None:
        """The record of a finished part whose files are all there, else None."""
        # parts/ first: where both are there, it is what was made again since the manifest was written
        path = self._path(shard, name)
        if (values := _read_record(path)) is not None:
            part: Part | None = Part.parse(values, where=str(path))
        else:
            part = self._of_manifest(shard, name)
        return part if part and all(file.intact(self.out) for file in part.shard.records) else None

    def _of_manifest(self, shard: int, name: str) -> Part | None:
        manifest = self.manifest
        if manifest is None or shard >= len(manifest.shards):
            return None
        stored = manifest.shards[shard]
        if name == TEXT and manifest.text:
            return Part(shard=stored.override(files={}, captions=None, skipped=()), identity=manifest.text.identity)
        if name not in (BASE, *manifest.features):
            return None
        own = {field: file for field, file in stored.files.items() if field in fields_of(name)}
        part = stored.override(files=own, captions=stored.captions if name == BASE else None, text={})
        return Part(shard=part, identity=manifest.autoencoder if name == BASE else manifest.features[name].identity)

    def missing_bases(self, names: Iterable[str]) -> list[str]:
        """Encoders whose tokens are there, but not the basis that they are coordinates in: it is computed again."""
        stored = self.manifest.features if self.manifest else {}
        return [n for n in names if n in stored and (basis := stored[n].basis) and not basis.intact(self.out)]

    def require_same_models(self, identities: Mapping[str, dict[str, Any]], num_shards: int) -> None:
        """Raises UserError where finished parts were made by other models; `identities`: part -> what identifies its model."""
        for name, identity in identities.items():
            for part in filter(None, (self.part(k, name) for k in range(num_shards))):
                if changed := [key for key, value in identity.items() if part.identity.get(key) != value]:
                    raise UserError(
                        f"The finished shards in {self.out} were made by another {identity.get('spec', name)} "
                        f"(different: {', '.join(changed)}): give the same weights, or choose another folder."
                    )

    def save(self, shard: int, name: str, part: Part) -> None:
        files.write_json(self._path(shard, name), part.model_dump(mode="json"))

    def claim(self, shard: int, name: str) -> BaseFileLock | None:
        """Lock a part for this process; None when another makes it. Files that a killed one left incomplete are removed."""
        handle = lock.take(self._path(shard, name, ".lock"))
        # only under the lock: without it an incomplete file may be of a process that is still writing
        if handle is not None:
            names = [array_name(field, shard) for field in fields_of(name)]
            for file in [*names, *([captions_name(shard)] if name == BASE else [])]:
                for path in self.out.glob(f".{file}.*.tmp"):
                    path.unlink()
        return handle

    def _path(self, shard: int, name: str, suffix: str = ".json") -> Path:
        return (self.out / PARTS / array_name(name, shard)).with_suffix(suffix)


class Claims:
    """Parts of shards that this process makes, locked while it does: equal commands share a folder.

    Args:
        out: the folder.
        wanted: shard -> the parts that this process would make.
        identities: part -> what identifies its model.
    """

    def __init__(self, out: Path, wanted: Mapping[int, Sequence[str]], identities: Mapping[str, dict[str, Any]]):
        self.out, self.wanted, self.identities = out, wanted, identities
        self._progress = FinishedParts(out)
        self._held: dict[tuple[int, str], BaseFileLock] = {}

    def pieces(self, shards: Sequence[PlannedShard], size: int, passed: Callable[[int], None]) -> Iterator[Piece]:
        """Pieces of `size` images of the shards that can be claimed, each claimed as its first piece is asked for.

        `passed` is called with the number of images of a shard that another process has made meanwhile or makes now.
        """
        for k, names in self.wanted.items():
            taken = {name: handle for name in names if (handle := self._progress.claim(k, name)) is not None}
            # others may have finished everything and removed parts/, whose records are in the manifest then
            if not (self.out / PARTS / SETTINGS_FILE).is_file():
                self._progress = FinishedParts(self.out)
            # asked again under the lock: another process may have finished the part and given its lock back since
            for name in [name for name in taken if self._progress.part(k, name) is not None]:
                lock.release(taken.pop(name))
            self._held.update({(k, name): handle for name, handle in taken.items()})
            rows = shards[k].rows
            if taken and not rows:  # a shard without images needs no model
                for name in taken:
                    self._progress.save(k, name, Part(shard=Shard(num=0), identity=self.identities[name]))
            if taken and rows:
                for at in range(0, len(rows), size):
                    yield Piece(k, rows[at : at + size], shards[k].flipped, tuple(taken))
            else:
                passed(len(rows))

    def finish(self, shard: int, parts: Mapping[str, Part]) -> None:
        """Record the finished parts of a shard, and give them back."""
        for name, part in parts.items():
            # the record before the lock is given back, or another process would make the part again
            self._progress.save(shard, name, part)
            lock.release(self._held.pop((shard, name)))

    def close(self) -> None:
        """Give back what is not finished."""
        while self._held:
            lock.release(self._held.popitem()[1])
