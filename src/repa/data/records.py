"""The files of a prepared folder: their names and their records."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from repa.base.config import Config
from repa.data.config import BASE, TEXT, plain_name


def fields_of(part: str) -> tuple[str, ...]:
    """The possible fields of a part."""
    if part == BASE:
        return ("labels", "images", "moments", "captions")
    if part == TEXT:
        return ("text", "text_mask", "text_scale", "text_rows")
    return (f"features.{part}", f"scale.{part}", f"pooled.{part}")


def captions_name(shard: int) -> str:
    return f"captions-{shard:05d}.jsonl"


def basis_name(encoder: str) -> str:
    """The file of the mean and the principal components of an encoder's tokens."""
    return f"{plain_name(f'basis.{encoder}')}.npy"


def damaged(path: Path, what: str) -> str:
    """The error message for a damaged file of a prepared folder."""
    return f"{path} {what}: delete it and run the same `repa prepare` again."


class StoredFile(Config):
    """A file of the folder with its size and checksum."""

    suffix: ClassVar[str]

    file: str
    """Its name in the folder."""
    size: int
    """Its bytes, header included."""
    sha256: str
    """Its checksum."""

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        """An untrusted manifest must not name files outside its folder."""
        # a colon separates drives and streams on Windows; the suffix excludes manifest.json and the like
        if not name.endswith(cls.suffix) or any(part in name for part in ("/", "\\", "\0", ":")):
            raise ValueError(f"{name!r} is not the plain name of a {cls.suffix} file in this folder")
        return name

    def intact(self, folder: Path) -> bool:
        """Whether the file exists with its size; only `check` compares its bytes."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.size


class ArrayFile(StoredFile):
    """One .npy file."""

    suffix: ClassVar[str] = ".npy"

    dtype: Literal["uint8", "int8", "int64", "float16", "float32"]
    """NumPy's name of its type, e.g. float16."""
    shape: tuple[int, ...]
    """Its shape, the number of images first."""


class TextFile(StoredFile):
    """One .jsonl file."""

    suffix: ClassVar[str] = ".jsonl"


class Shard(Config):
    """The files of consecutive images, by field."""

    num: int
    """Number of images."""
    files: dict[str, ArrayFile] = Field(default_factory=dict)
    """Field -> file."""
    captions: TextFile | None = None
    """Captions, if the source has any: one JSON list of texts per image and line."""
    text: dict[str, ArrayFile] = Field(default_factory=dict)
    """Field -> file of caption tokens, with one row per caption; see data/reader.py."""
    flipped: bool = False
    """Whether the images are mirrored; mirrored shards follow all others, in the same order."""
    skipped: tuple[str, ...] = ()
    """Unreadable images that were skipped."""

    @property
    def records(self) -> list[ArrayFile | TextFile]:
        """All its files."""
        return [*self.files.values(), *([self.captions] if self.captions else []), *self.text.values()]


class FeatureField(Config):
    """The stored tokens of one vision encoder."""

    dim: int
    """Width of a token."""
    grid: int
    """Side of the token grid."""
    pooled: bool
    """Whether pooled features are stored too."""
    form: str = "fp16"
    """Stored form of tokens: fp16, int8, pcaK or pcaK-int8."""
    basis: ArrayFile | None = None
    """Mean and K directions (1 + K, dim), for the forms with pca."""
    identity: dict[str, Any]
    """Identity of the encoder and its weights."""


class TextField(Config):
    """The stored tokens of the captions."""

    dim: int = Field(ge=1)
    """Width E of a token."""
    num_tokens: int = Field(ge=1)
    """Tokens S of a caption."""
    masked: bool
    """Whether a mask marks the tokens of the caption."""
    form: Literal["fp16", "int8"] = "fp16"
    """Stored form of the tokens."""
    identity: dict[str, Any]
    """Identity of the text encoder and its weights."""

    @property
    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Field -> type and shape of one entry: per caption, and for text_rows per image."""
        tokens = ("int8" if self.form == "int8" else "float16", (self.num_tokens, self.dim))
        scale = {"text_scale": ("float32", (self.num_tokens,))} if self.form == "int8" else {}
        mask = {"text_mask": ("uint8", (self.num_tokens,))} if self.masked else {}
        return {"text": tokens, **scale, **mask, "text_rows": ("int64", (2,))}
