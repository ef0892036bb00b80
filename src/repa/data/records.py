"""Records of files: what a manifest knows of each, so that it can tell whether it is still the same."""

from pathlib import Path

from pydantic import Field, field_validator

from repa.base.config import Config

DTYPES = ("uint8", "int8", "int64", "float16", "float32")


class ArrayFile(Config):
    """One .npy file."""

    file: str
    """Its name in the folder."""
    dtype: str
    """NumPy's name of its type, e.g. float16."""
    shape: tuple[int, ...]
    """Its shape, the number of images first."""
    size: int
    """Its bytes, header included."""
    sha256: str
    """Its checksum."""

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return _plain_name(name, ".npy")

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype!r} is not a type that shards hold: {', '.join(DTYPES)}")
        return dtype

    def intact(self, folder: Path) -> bool:
        """Whether the file is there with its size; its bytes are compared by `check` only."""
        return _has_size(folder / self.file, self.size)


class TextFile(Config):
    """One .jsonl file."""

    file: str
    """Its name in the folder."""
    size: int
    """Its bytes."""
    sha256: str
    """Its checksum."""

    @field_validator("file")
    @classmethod
    def _plain(cls, name: str) -> str:
        return _plain_name(name, ".jsonl")

    def intact(self, folder: Path) -> bool:
        """Whether the file is there with its size."""
        return _has_size(folder / self.file, self.size)


class Shard(Config):
    """The files of some consecutive images, by field."""

    num: int
    """Images in it."""
    files: dict[str, ArrayFile]
    """Field -> file."""
    captions: TextFile | None = None
    """Their captions, where the source has some: a JSON list of texts for each image, one a line."""
    text: dict[str, ArrayFile] = Field(default_factory=dict)
    """Field -> file of their captions' tokens, which have as many rows as there are captions; see data/texts.py."""
    flipped: bool = False
    """Whether the images are mirrored, left for right; such shards follow all the others, in the same order."""
    skipped: tuple[str, ...] = ()
    """Images that could not be read and are left out."""

    @property
    def records(self) -> list[ArrayFile | TextFile]:
        """All its files."""
        return [*self.files.values(), *([self.captions] if self.captions else []), *self.text.values()]


def _plain_name(name: str, suffix: str) -> str:
    """A manifest may come from anyone: it must not make us open files elsewhere."""
    if not name.endswith(suffix) or any(part in name for part in ("/", "\\", "\0", ":")):
        raise ValueError(f"{name!r} is not the plain name of a {suffix} file in this folder")
    return name


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
