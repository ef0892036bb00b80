"""manifest.json: the contents of a folder of shards, and the models that encoded them.

DATA/
  manifest.json               written last: a folder with a manifest is complete
  images-00000.npy            one file for each field and shard: images, labels, moments, features.NAME, scale.NAME, pooled.NAME
  captions-00000.jsonl        a JSON list of captions for each image of the shard, if the source has captions
  text-00000.npy              tokens of these captions, with text_mask, text_scale and text_rows (data/reader.py)
  basis.NAME.npy              mean and directions of tokens stored as coordinates
  parts/                      only while unfinished: settings.json, a record for each finished part
"""

import collections
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from repa.base import files
from repa.base.config import Config
from repa.base.errors import UserError, printable
from repa.base.registry import Spec
from repa.data.config import BASE, TEXT, PrepareConfig
from repa.data.records import ArrayFile, FeatureField, Shard, StoredFile, TextField, TextFile, damaged
from repa.encoders import ENCODERS

VERSION = 1
MANIFEST = "manifest.json"
PARTS = "parts"
SETTINGS_FILE = "settings.json"


class Inventory(Config):
    """The inventory of a source."""

    labels_from: str = ""
    """Origin of the labels."""
    left_out: dict[str, int] = Field(default_factory=dict)
    """Kind -> number left out."""
    captioned: int | None = None
    """Number of images with captions, without mirrored copies; None if the source has no captions."""


class Settings(Config):
    """Source and settings of a preparation: parts/settings.json, which is written before any work."""

    source: dict[str, Any]
    """Identity of the source, with a checksum."""
    config: PrepareConfig
    """Settings of the preparation."""
    class_names: tuple[Annotated[str, AfterValidator(printable)], ...]
    """Names of the classes, in the order of the labels."""
    inventory: Inventory = Inventory()
    """Origin of the labels, and what was left out."""


def require_data(folder: Path) -> Path:
    """The manifest of a data folder; raises UserError if there is none. Reads nothing."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PARTS).is_dir():
            raise UserError(f"The preparation of {folder} is not finished: run the same `repa prepare` again.")
        meant = files.near(folder, MANIFEST)
        make = f"run `repa prepare SOURCE {folder}`"
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):  # images, or a run
            make = f"if it holds images, run `repa prepare {folder} DATA` and give DATA"
        raise UserError(f"{folder} holds no prepared data (no {MANIFEST}): {make}.{meant}")
    return path


class Manifest(Settings):
    """A complete data set: its settings and its files."""

    version: int = VERSION
    """Format of this file."""
    num_images: int = Field(ge=1)
    """Images in all shards, including mirrored copies."""
    class_counts: tuple[int, ...]
    """Images of each class, without mirrored copies."""
    autoencoder: dict[str, Any]
    """Identity of the autoencoder and its weights."""
    features: dict[Annotated[str, Spec(ENCODERS)], FeatureField]
    """Encoder -> its stored tokens."""
    text: TextField | None = None
    """The stored tokens of the captions, if any."""
    shards: tuple[Shard, ...]
    """The shards, in order; one whose images are all skipped has no files."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not isinstance(self.source.get("name"), str):
            raise ValueError("its source has no name")
        if sum(shard.num for shard in self.shards) != self.num_images:
            raise ValueError(f"num_images is {self.num_images}, but its shards hold {sum(s.num for s in self.shards)}")
        # readers of a folder index by these numbers, so they are checked once here
        counts = self.class_counts
        if len(counts) != len(self.class_names) or min(counts, default=0) < 0 or sum(counts) != len(self.originals):
            raise ValueError(
                f"class_counts do not add up to {len(self.originals):,} images of {len(self.class_names):,} classes"
            )
        fields = self.fields
        for number, shard in enumerate(self.shards):
            if shard.num and {field: (f.dtype, f.shape[1:]) for field, f in shard.files.items()} != fields:
                raise ValueError(f"shard {number} has other fields, types or shapes than the first")
            if any(f.shape[:1] != (shard.num,) for f in shard.files.values()):
                raise ValueError(f"shard {number} has files without its {shard.num} images")
        side = self.config.resolution
        if "images" in fields and fields["images"][1] != (3, side, side):
            raise ValueError(f"its images are {'x'.join(map(str, fields['images'][1]))}, but its resolution is {side}")
        names = [file.file for shard in self.shards for file in (*shard.files.values(), *shard.text.values())]
        if twice := next((name for name, num in collections.Counter(names).items() if num > 1), ""):
            raise ValueError(f"the file {twice} is named twice")
        expected = {"labels", *(f"features.{name}" for name in self.features)}
        expected |= {f"pooled.{name}" for name, facts in self.features.items() if facts.pooled}
        expected |= {f"scale.{name}" for name, facts in self.features.items() if facts.form.endswith("int8")}
        if set(fields) - {"images", "moments"} != expected:
            raise ValueError(f"its shards hold {', '.join(sorted(fields))}, which contradicts its other entries")
        originals = [shard.num for shard in self.shards[: len(self.shards) // 2]]
        copied = [(False, num) for num in originals] + [(True, num) for num in originals]
        self._check_text()
        if any(s.flipped for s in self.shards) and [(s.flipped, s.num) for s in self.shards] != copied:
            raise ValueError("its mirrored shards do not match the shards of the originals")
        return self

    def _check_text(self) -> None:
        """Every shard of originals with images must have all files of caption tokens."""
        wanted = self.text.fields if self.text else {}
        for number, shard in enumerate(self.shards):
            stored = {field: (f.dtype, f.shape[1:]) for field, f in shard.text.items()}
            if stored != (wanted if shard.num and not shard.flipped else {}):
                raise ValueError(f"shard {number} has other caption tokens than it declares")
            nums = {f.shape[:1] for field, f in shard.text.items() if field != "text_rows"}
            if stored and (len(nums) != 1 or shard.text["text_rows"].shape[:1] != (shard.num,)):
                raise ValueError(f"shard {number} has caption tokens that do not match its images")

    def settings(self, **changes: Any) -> Settings:
        """The settings with some changes."""
        return Settings.parse({**self.model_dump(include=set(Settings.model_fields)), **changes})

    @property
    def parts(self) -> set[str]:
        """The parts of every shard: base, the encoders, text."""
        return {BASE, *self.features, *([TEXT] if self.text else [])}

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def records(self) -> list[ArrayFile | TextFile]:
        """All files, of shards and bases."""
        bases = [facts.basis for facts in self.features.values() if facts.basis]
        return [*(record for shard in self.shards for record in shard.records), *bases]

    def require_intact(self, folder: str | Path, records: Iterable[StoredFile] | None = None) -> None:
        """Raises UserError if a file (of `records`, else any) is missing or has another size; reads no contents."""
        for record in self.records if records is None else records:
            if not record.intact(Path(folder)):
                raise UserError(damaged(Path(folder, record.file), "is missing or does not have its recorded size"))

    @property
    def originals(self) -> range:
        """The indices that are not mirrored copies: class counts, metrics and references use only these."""
        return range(sum(shard.num for shard in self.shards if not shard.flipped))

    @property
    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Field -> type and shape of one image's entry."""
        first = next(shard for shard in self.shards if shard.num)  # a shard whose images were all skipped has no files
        return {field: (f.dtype, f.shape[1:]) for field, f in first.files.items()}

    @property
    def skipped(self) -> list[str]:
        """Unreadable images that were skipped, in the order of the source."""
        return [name for shard in self.shards if not shard.flipped for name in shard.skipped]

    def save(self, folder: Path) -> None:
        """Write DATA/manifest.json atomically."""
        files.write_sealed(folder / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Read and check DATA/manifest.json; raises UserError if it is missing, damaged or of another version."""
        path = require_data(Path(folder))
        values = files.read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path} is damaged: it must hold an object, but holds {type(values).__name__}.")
        if values.get("version") != VERSION:
            raise UserError(
                f"{path} has version {values.get('version')!r}, but this version of repa reads {VERSION}: "
                "prepare the data again, in a new folder."
            )
        return cls.parse(values, where=str(path))

    def describe(self) -> list[str]:
        """A short description in lines of text."""
        size = sum(record.size for record in self.records)
        fields = [
            " ".join((name, dtype, "x".join(map(str, shape)))).strip() for name, (dtype, shape) in self.fields.items()
        ]
        tokens = [f"{name} ({f.grid} x {f.grid} x {f.dim} as {f.form})" for name, f in self.features.items()]
        copies = ", and a mirrored copy of each" if len(self.originals) < self.num_images else ""
        checksum = str(self.autoencoder.get("sha256") or "no weights")[:12]
        lines = [
            f"source       {self.source['name']}",
            f"images       {len(self.originals):,} of {len(self.class_names)} classes at {self.resolution} pixels{copies}",
            f"autoencoder  {self.config.autoencoder} ({checksum}), computed in {self.config.precision}",
            f"tokens       {', '.join(tokens) or 'none'}",
            *(
                [f"text         {self.config.text} ({self.text.num_tokens} x {self.text.dim} as {self.text.form})"]
                if self.text
                else []
            ),
            f"fields       {', '.join(fields)}{', captions' if any(s.captions for s in self.shards) else ''}",
            f"on disk      {files.size(size)} in {len(self.shards):,} shard{'s' * (len(self.shards) > 1)}",
        ]
        return [*lines, *([f"left out     {len(self.skipped)} unreadable"] if self.skipped else [])]


def remove_parts(folder: Path) -> None:
    """Remove parts/ of a complete folder, and incomplete manifest and basis files of killed processes."""
    files.remove_folder(folder / PARTS)
    files.remove_leftovers(folder, lambda name: name in (PARTS, MANIFEST) or name.startswith("basis."))
