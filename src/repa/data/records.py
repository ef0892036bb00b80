"""The files of a prepared folder: their names, and how each is recorded."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from repa.base.config import Config
from repa.data.config import BASE, TEXT, plain_name

STORED_DTYPES = ("uint8", "int8", "int64", "float16", "float32")


def fields_of(part: str) -> tuple[str, ...]:
    """The fields that a part may have."""
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
    """The message for a damaged file of a prepared folder."""
    return f"{path} {what}: delete it and run the same `repa prepare` again, which makes it again."


class StoredFile(Config):
    """A file of the folder, and how to tell whether it is still the same."""

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
        """A manifest may come from anyone: it must not lead outside its folder."""
        # a colon separates a drive or a stream of Windows; the suffix keeps manifest.json and the like from being named
        if not name.endswith(cls.suffix) or any(part in name for part in ("/", "\\", "\0", ":")):
            raise ValueError(f"{name!r} is not the plain name of a {cls.suffix} file in this folder")
        return name

    def intact(self, folder: Path) -> bool:
        """Whether the file is there with its size; its bytes are compared by `check` only."""
        path = folder / self.file
        return path.is_file() and path.stat().st_size == self.size


class ArrayFile(StoredFile):
    """One .npy file."""

    suffix: ClassVar[str] = ".npy"

    dtype: str
    """NumPy's name of its type, e.g. float16."""
    shape: tuple[int, ...]
    """Its shape, the number of images first."""

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in STORED_DTYPES:
            raise ValueError(f"{dtype!r} is not a type that shards hold: {', '.join(STORED_DTYPES)}")
        return dtype


class TextFile(StoredFile):
    """One .jsonl file."""

    suffix: ClassVar[str] = ".jsonl"


class Shard(Config):
    """The files of some consecutive images, by field."""

    num: int
    """Images in it."""
    files: dict[str, ArrayFile] = Field(default_factory=dict)
    """Field -> file."""
    captions: TextFile | None = None
    """Their captions, where the source has some: a JSON list of texts for each image, one a line."""
    text: dict[str, ArrayFile] = Field(default_factory=dict)
    """Field -> file of their captions' tokens, which have as many rows as there are captions; see data/captions.py."""
    flipped: bool = False
    """Whether the images are mirrored, left for right; such shards follow all the others, in the same order."""
    skipped: tuple[str, ...] = ()
    """Images that could not be read and are left out."""

    @property
    def records(self) -> list[ArrayFile | TextFile]:
        """All its files."""
        return [*self.files.values(), *([self.captions] if self.captions else []), *self.text.values()]


class FeatureField(Config):
    """The stored tokens of one vision encoder."""

    dim: int
    """Channels of a token."""
    grid: int
    """Side of the token grid."""
    pooled: bool
    """Whether the pooled features are stored too."""
    form: str = "fp16"
    """How tokens are stored: fp16, int8, pcaK or pcaK-int8."""
    basis: ArrayFile | None = None
    """Mean and K directions (1 + K, dim), for the forms with pca."""
    identity: dict[str, Any]
    """Which encoder, which weights."""


class TextField(Config):
    """The stored tokens of the captions."""

    dim: int = Field(ge=1)
    """Width E of a token."""
    num_tokens: int = Field(ge=1)
    """Tokens S of a caption."""
    masked: bool
    """Whether a mask says which of them are the caption's."""
    form: Literal["fp16", "int8"] = "fp16"
    """How they are stored."""
    identity: dict[str, Any]
    """Which text encoder, which weights."""

    @property
    def fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Field -> type and shape of one entry: of a caption, and for text_rows of an image."""
        tokens = ("int8" if self.form == "int8" else "float16", (self.num_tokens, self.dim))
        scale = {"text_scale": ("float32", (self.num_tokens,))} if self.form == "int8" else {}
        mask = {"text_mask": ("uint8", (self.num_tokens,))} if self.masked else {}
        return {"text": tokens, **scale, **mask, "text_rows": ("int64", (2,))}
