"""The contract of a source of images, and helpers that several sources share."""

import codecs
import collections
import contextlib
import functools
import hashlib
import json
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
from repa.base.images import adm_centre_crop, decode_image, encode_png, grid, image_endings, to_tensor
from repa.data.config import PrepareConfig

ONE_CLASS = "all"
EXTENSIONS = image_endings()
"""Endings of the formats that `base.images` decodes; other files are counted and left out."""
# every worker keeps a whole file in memory while it decodes it
MAX_FILE_SIZE = 1 << 28  # bytes of one image file, unpacked
# a checksum of all images would read all data at every start; a sample notices replaced pictures
SAMPLED = 64  # images whose bytes are part of the identity of a source
CAPTION_COLUMNS = ("caption", "captions", "text")  # usual names of columns of captions
NUMBERS = re.compile(r"[-+0-9][-+.,;0-9eE\s]*")
CAPTION_ENDING = ".txt"  # of a text file beside an image, with the same name


class Classes(NamedTuple):
    """The class of each image."""

    labels: np.ndarray  # (N,) int64
    names: list[str]
    origin: str
    """Origin of the labels, as `repa prepare` reports it."""


def one_class(num: int, labels: str = "", *, why: str = "nothing looks like a label") -> Classes:
    """One class for all images. The origin is `--labels none` if the user chose that, else the reason `why`."""
    return Classes(np.zeros(num, np.int64), [ONE_CLASS], f"{'--labels none' if labels == 'none' else why}: one class")


class Source(ABC):
    """Images in a fixed order, each with a class, read by index. Threads may share a source, and so may processes that
    get it by fork or pickle. Sources of shards (tar, parquet) are fastest in order."""

    class_names: list[str]
    """Names of the classes, in the order of the labels."""
    labels: np.ndarray
    """(N,) int64."""
    identity: dict[str, Any]
    """Name and checksums of the source: equal for equal images, wherever they are stored."""
    has_captions: bool = False
    """Whether any image may have captions."""
    labels_from: str = ""
    """Origin of the labels, as `repa prepare` reports it."""
    opened_with: str = ""
    """The choice of labels with which `open_source` opened it."""
    left_out: Mapping[str, int] = MappingProxyType({})
    """Kind -> number of things in the source that are not used: "files .txt2" -> 3."""
    moments_shape: tuple[int, ...] | None = None
    """(2C, h, w), the shape of the moments that come with the images; None without moments."""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        classes = "1 class" if len(self.class_names) == 1 else f"{len(self.class_names)} classes"
        return f"{type(self).__name__}: {len(self)} images of {classes}; labels from {self.labels_from}"

    def _repr_png_(self) -> bytes:
        """For notebooks: up to 16 evenly spaced images at 64 pixels."""
        import torch

        number = min(16, len(self))
        shown = [to_tensor(self.image(place * len(self) // number, 64)) for place in range(number)]
        return encode_png(grid(torch.stack(shown), columns=8, padding=0))

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of an image, for messages."""

    def contents(self, index: int) -> bytes:
        """The file of image `index`, for sources of files; raises UserError with its name if it is unreadable."""
        raise NotImplementedError

    def decode(self, index: int) -> Image.Image:
        """Image `index` at its own size, RGB; raises UserError with its name if it is unreadable."""
        return decode_image(self.contents(index), self.name(index))

    def image(self, index: int, resolution: int) -> Image.Image:
        """Image `index` as RGB (resolution, resolution), by ADM's centre crop; raises UserError if it is unreadable."""
        image = self.decode(index)
        try:
            return adm_centre_crop(image, resolution)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of an image: none, one or several alternatives."""
        return ()

    def moments(self, index: int) -> np.ndarray:
        """The moments of an image, for sources with `moments_shape`: mean and standard deviation, unscaled, float32."""
        raise NotImplementedError

    def require_fit(self, config: PrepareConfig) -> None:  # noqa: B027 (a source without moments fits any)
        """Raises UserError for settings that moments do not fit: another autoencoder or resolution than they are of."""

    def __getstate__(self) -> dict[str, Any]:
        """All but cached properties: open files and memory maps work in one process, so each process opens its own."""
        cached = functools.cached_property
        return {
            key: value for key, value in self.__dict__.items() if not isinstance(getattr(type(self), key, None), cached)
        }

    def _identify(self, classes: Classes, name: str, *, with_labels: bool = True, **facts: Any) -> None:
        """Set the classes, and the identity from `facts` such as checksums of contents."""
        self.labels, self.class_names, self.labels_from = classes
        if alike := names_alike(self.class_names):
            self.labels_from += f"; separate classes with similar names: {', '.join(alike[:6])}"
        if with_labels:
            names = "\n".join(self.class_names).encode()
            facts["labels_sha256"] = hashlib.sha256(self.labels.tobytes() + names).hexdigest()
        self.identity = {"name": name, "num_images": len(self), **facts}

    def _require_no_numbers(
        self, where: str, choice: str = "write them into a table and give --labels TABLE.csv:COLUMN"
    ) -> None:
        """Raises UserError for one class with numbers as captions, because some programs write labels like this."""
        texts: list[str] = []
        with contextlib.suppress(UserError):  # an unreadable text is no evidence of labels
            texts += (text for index in _sampled(len(self)) for text in self.captions(index))
        if len(self.class_names) == 1 and texts and all(NUMBERS.fullmatch(text) for text in texts):
            raise UserError(
                f"The texts beside the images of {where} are numbers such as {texts[0][:20]!r}, which look like "
                f"labels: {choice}, or give --labels none."
            )

    def _sampled_digest(self, num: int, *, strict: bool = False) -> str:
        """A checksum of the bytes of SAMPLED evenly spaced images, which can change under equal names and sizes.

        An unreadable image raises UserError if `strict`; else it counts as empty, and its decoding raises the error.
        """
        digest = hashlib.sha256()
        for index in _sampled(num):
            try:
                data = self.contents(index)
            except UserError:
                if strict:
                    raise
                data = b""
            digest.update(hashlib.sha256(data).digest())
        return digest.hexdigest()


def _sampled(num: int) -> list[int]:
    return sorted({round(k * (num - 1) / (SAMPLED - 1)) for k in range(SAMPLED)})


def plain_text(text: str) -> str:
    """A name as people see it: accents composed (NFC), no surrounding spaces and zero-width characters."""
    return unicodedata.normalize("NFC", text.strip().strip("\u200b\u200e\u200f\u2060\ufeff").strip())


def names_alike(names: Iterable[str]) -> list[str]:
    """Names that may mean the same class: they differ only in case, spaces and the like, or spell the same number."""
    groups = collections.defaultdict(list)
    for name in names:
        folded = re.sub(r"[\s_]", "", unicodedata.normalize("NFKC", name).casefold())
        groups[float(folded) if re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]*)?", folded) else folded].append(name)
    return [name for group in groups.values() if len(group) > 1 for name in group]


class Strings(Sequence[str]):
    """Many short texts in two arrays: 8 bytes plus UTF-8 for each, about 50 bytes less than a list of str needs."""

    def __init__(self, texts: Iterable[str]):
        # Python decodes a file name that is not UTF-8 to halves of surrogate pairs, which must survive a round trip
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
    """The bytes of an image file of at most MAX_FILE_SIZE; `name` is for errors."""
    name = name or str(path)
    faults.require_plain(path)
    try:
        require_image_size(size := path.stat().st_size, name)
        with path.open("rb") as file:
            return file.read(size)  # no more: files of /proc have the size 0, and some of them never end
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error


def require_image_size(size: int, name: str) -> None:
    """Raises UserError for a file larger than MAX_FILE_SIZE."""
    if size > MAX_FILE_SIZE:
        limit = files.size(MAX_FILE_SIZE)
        raise UserError(f"{name} has {files.size(size)}, more than the limit of {limit} per image: remove it.")


def text_of(data: bytes, errors: str = "strict") -> str:
    """A text in UTF-8, or in UTF-16 with its mark, in which Windows and spreadsheets save "Unicode"; without the mark.

    Raises ValueError for other data; with errors="replace", wrong letters are replaced.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig", errors)
    if "\0" in text and errors == "strict":
        raise ValueError("it holds bytes that are not text in UTF-8")
    return text


def caption_lines(data: bytes) -> tuple[str, ...]:
    """The captions in a text file, one per line; () if it is not Unicode, so that the image is still used."""
    try:
        return tuple(line.strip() for line in text_of(data).splitlines() if line.strip())
    except ValueError:
        return ()


def caption_values(value: Any) -> tuple[str, ...]:
    """The captions in a value of a .json or a column: a text or a list of texts; () for any other value."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        return ()
    return tuple(text for text in values if text)


def json_object(data: bytes, name: str) -> dict[str, Any]:
    """The object in a JSON file; raises UserError for any other content."""
    with faults.reading(name, "JSON"):
        value = json.loads(data, object_pairs_hook=files.unique_keys)
    if not isinstance(value, dict):
        raise UserError(f"{name} holds {type(value).__name__}: it must hold a JSON object.")
    return value
