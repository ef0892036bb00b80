"""What a source of images is, and what the names of its files say: several by one name, parts of a data set, junk."""

import glob
import hashlib
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import numpy as np
from PIL import Image

from repa.base import faults, files
from repa.base.errors import UserError
from repa.base.images import adm_centre_crop, decode_image, image_endings

ONE_CLASS = "all"
EXTENSIONS = image_endings()
"""Endings of the formats that `base.images` decodes; other files are counted and left out."""
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
SAMPLED = 64  # images of a source whose bytes are part of its identity
CAPTIONS = ("caption", "captions", "text")  # columns of texts
CAPTION = ".txt"  # a text next to an image, with the same name
MAX_FILES = 1_000_000
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")  # a range of numbers, or words
JUNK = (
    "__macosx", "@eadir", "#recycle", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information", "lost+found",
    "thumbs.db", "desktop.ini", "__pycache__",
)  # fmt: skip
MEANINGS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "eval": "val",
    "test": "test", "testing": "test", "holdout": "test",
}  # fmt: skip
"""Names of parts of one data set, which are not classes."""


class Classes(NamedTuple):
    """A class for each image."""

    labels: np.ndarray  # (N,) int64
    names: list[str]


def no_classes(num: int) -> Classes:
    """One class for all."""
    return Classes(np.zeros(num, np.int64), [ONE_CLASS])


def labels_digest(classes: Classes) -> str:
    """A checksum of the labels and the names of their classes."""
    names = "\n".join(classes.names).encode()
    return hashlib.sha256(classes.labels.tobytes() + names).hexdigest()


class Source(ABC):
    """Images in a fixed order, each with a class; read by index, from several threads and, pickled or forked, from
    several processes. A source over shards (tar, parquet) is read fastest in order."""

    class_names: list[str]
    """Names of the classes, in the order of the labels."""
    labels: np.ndarray
    """(N,) int64."""
    identity: dict[str, Any]
    """What it is and a checksum of its list: equal for equal images, wherever they lie."""
    has_captions: bool = False
    """Whether any image may have one."""
    labels_from: str = "nothing label-like: one class"
    """Where the labels came from, for the inventory."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """What of the source is not taken, and how often: "files .txt2" -> 3."""
    moments_shape: tuple[int, ...] | None = None
    """(2C, h, w) of the moments that an autoencoder made of the images before; None where there are none."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes = "1 class" if len(self.class_names) == 1 else f"{len(self.class_names)} classes"
        return f"{type(self).__name__}: {len(self)} images of {classes}; labels from {self.labels_from}"

    def _repr_png_(self) -> bytes:
        """For notebooks: up to 16 images at equal distances, at 64 pixels."""
        number = min(16, len(self))
        sheet = Image.new("RGB", (64 * min(number, 8), 64 * -(-number // 8)))
        for place in range(number):
            sheet.paste(self.image(place * len(self) // number, 64), (64 * (place % 8), 64 * (place // 8)))
        content = io.BytesIO()
        sheet.save(content, "PNG")
        return content.getvalue()

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    def contents(self, index: int) -> bytes:
        """The bytes of image `index` as a file, of a source of files; raises UserError, which names it, if it cannot be read."""
        raise NotImplementedError

    def decode(self, index: int) -> Image.Image:
        """Image `index` as it is, RGB; raises UserError, which names it, if it cannot be read."""
        return decode_image(self.contents(index), self.name(index))

    def image(self, index: int, resolution: int) -> Image.Image:
        """Image `index` as RGB (resolution, resolution), by ADM's centre crop; raises UserError if it cannot be read."""
        image = self.decode(index)
        try:
            return adm_centre_crop(image, resolution)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image: none, one, or several that describe it in turn."""
        return ()

    def moments(self, index: int) -> np.ndarray | None:
        """The moments that come with an image: float32 `moments_shape`, mean and standard deviation, unscaled."""
        return None

    def _sampled_digest(self, num: int, *, strict: bool = False) -> str:
        """A checksum of the contents of SAMPLED images at equal distances: names and sizes may stay when pictures change.

        One that cannot be read is refused if `strict`, and otherwise when it is decoded.
        """
        digest = hashlib.sha256()
        for index in sorted({round(k * (num - 1) / (SAMPLED - 1)) for k in range(SAMPLED)}):
            try:
                data = self.contents(index)
            except UserError:
                if strict:
                    raise
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def plain_text(text: str) -> str:
    """A name as people see it: no spaces around it, and one form of each accented letter."""
    return unicodedata.normalize("NFC", text.strip())


class Strings(Sequence[str]):
    """Many short texts in two arrays: 8 bytes and its letters for each, where a list of str takes 50 more."""

    def __init__(self, texts: Iterable[str]):
        encoded = [text.encode(errors="surrogatepass") for text in texts]
        self._ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self._letters = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._letters[start:end].decode(errors="surrogatepass")
            start = end

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return self._letters[start:end].decode(errors="surrogatepass")


def read_image_file(path: Path, name: str = "") -> bytes:
    """The bytes of an image file of bounded size; raises UserError, which calls it `name`."""
    name = name or str(path)
    faults.require_plain(path)
    try:
        require_image_size(path.stat().st_size, name)
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error


def require_image_size(size: int, name: str) -> None:
    """Raises UserError for a file larger than MAX_FILE_SIZE."""
    if size > MAX_FILE_SIZE:
        limit = files.size(MAX_FILE_SIZE)
        raise UserError(f"{name} has {files.size(size)}, more than an image may have ({limit}): remove it.")


def caption_lines(data: bytes, name: str) -> tuple[str, ...]:
    """The captions in a text file, one a line; none of a text that is not UTF-8, which does not lose the image."""
    try:
        return tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError:
        return ()


def caption_values(value: Any) -> tuple[str, ...]:
    """A caption, or a list of them, as they lie in a .json or a column; none where they are anything but texts."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        return ()
    return tuple(text for text in values if text)


def hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's images."""
    return name.startswith(".") or name.lower() in JUNK


def leads_out(name: str) -> bool:
    """Whether a path of an archive would leave the folder it is unpacked to."""
    name = name.replace("\\", "/")
    return name.startswith("/") or re.match(r"[A-Za-z]:", name) is not None or ".." in name.split("/")


def is_remote(name: str) -> bool:
    """Whether a file is fetched: a URL, or the output of a command (`pipe:`)."""
    return name.startswith("pipe:") or re.match(r"[a-z][a-z0-9+]*://", name) is not None


def expand(spec: str) -> list[str]:
    """The files that a name stands for: braces first, as a shell does, then * ? [] for files on this machine.

    Raises:
        UserError: a range that goes down, more than MAX_FILES, or a pattern that no file matches.
    """
    names = _braces(spec)
    if is_remote(spec):
        return names
    found: list[str] = []
    for name in names:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        if not matches:
            raise UserError(f"There is no file {name!r}{'' if name == spec else f', of {spec!r}'}: give its path.")
        found += matches
    return found


def is_pattern(spec: str) -> bool:
    return any(mark in spec for mark in "*?[") or BRACES.search(spec) is not None


def _braces(spec: str) -> list[str]:
    match = BRACES.search(spec)
    if not match:
        return [spec]
    first, last, words = match.groups()
    if words is not None:
        options = words.split(",")
    elif 0 <= int(last) - int(first) < MAX_FILES:
        width = len(first) if first.startswith("0") else 0
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        raise UserError(f"{spec!r} has the range {match.group()}: it goes up, over at most {MAX_FILES:,} files.")
    names = []
    for option in options:
        names += _braces(spec[: match.start()] + option + spec[match.end() :])
        if len(names) > MAX_FILES:
            raise UserError(f"{spec!r} stands for more than {MAX_FILES:,} files: give fewer at a time.")
    return names


def splits_among(names: Iterable[str]) -> list[str]:
    """Those of the names that look like splits, sorted: the bare words, and where two differ also train2017 and seg_test."""
    found = {name: meaning for name in names if (meaning := _meaning(name))}
    if len(set(found.values())) > 1:
        return sorted(found)
    return sorted(name for name in found if name.lower() in MEANINGS)


def _meaning(name: str) -> str:
    words = re.split("[^a-z]+", name.lower())
    return next((MEANINGS[word] for word in words if word in MEANINGS), "")


def require_one_split(files: Sequence[str]) -> None:
    """Raises UserError for shards of several splits, which would become one set in silence."""
    stems = [Path(file.partition("?")[0]).stem for file in files]
    meanings = {stem: _meaning(stem) for stem in stems}
    if len(found := sorted({meaning for meaning in meanings.values() if meaning})) > 1:
        first = next(file for file, stem in zip(files, stems, strict=True) if meanings[stem])
        others = ", ".join(sorted(stem for stem in meanings if meanings[stem])[:4])
        raise UserError(
            f"{Path(first).parent} holds several splits ({', '.join(found)}: {others}): give the files of one, such as {first}."
        )
