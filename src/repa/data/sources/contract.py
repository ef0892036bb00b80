"""What a source of images is."""

import hashlib
import io
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from repa.base.errors import UserError
from repa.base.images import adm_centre_crop


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

    @abstractmethod
    def decode(self, index: int) -> Image.Image:
        """Image `index` as it is, RGB; raises UserError, which names it, if it cannot be read."""

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


SAMPLED = 64  # images of a source whose bytes are part of its identity


def sampled_digest(num: int, read: Callable[[int], bytes]) -> str:
    """A checksum of the contents of SAMPLED images at equal distances: names and sizes may stay when pictures change."""
    digest = hashlib.sha256()
    for index in sorted({round(k * (num - 1) / (SAMPLED - 1)) for k in range(SAMPLED)}):
        digest.update(hashlib.sha256(read(index)).digest())
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

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return self._letters[start:end].decode(errors="surrogatepass")


def printable(name: str) -> str:
    """File names that are not UTF-8 cannot be written into a manifest as they are."""
    return re.sub("[\ud800-\udfff]", "\ufffd", name)
