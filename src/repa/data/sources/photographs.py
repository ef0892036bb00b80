"""Real images without a download: random crops of the photographs inside the package."""

import functools
import hashlib
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveInt

from repa.base.images import decode_image
from repa.data.sources.contract import Classes, Source, one_class

FOLDER = Path(__file__).parents[1] / "photographs"  # CC0; ATTRIBUTION.md there has the origin of each
CLOSE = 0.8  # crops with a smaller share are captioned "close"
LIGHTS = {
    "dark": (0.4, 0.0),
    "": (1.0, 0.0),
    "bright": (0.4, 255.0),
}  # word -> factor of the contrast, and the value that pixels move towards
SMALLEST = 0.6  # side of the smallest crop, relative to the photograph's: large enough to recognise the motif


@functools.cache
def load_photographs() -> dict[str, Image.Image]:
    """Class name -> photograph, RGB, square, in the order of the names."""
    files = {path.stem.replace("-", " "): path for path in sorted(FOLDER.glob("*.jpg"))}
    return {name: decode_image(path.read_bytes(), path.name) for name, path in files.items()}


@functools.cache
def checksum() -> str:
    """SHA-256 of the pixels of all photographs: data prepared from other photographs is not continued."""
    digest = hashlib.sha256()
    for photograph in load_photographs().values():
        digest.update(photograph.tobytes())
    return digest.hexdigest()


class Crop(NamedTuple):
    """A square part of a photograph: side relative to the photograph's, corner in pixels, and whether mirrored."""

    share: float
    left: float
    top: float
    mirrored: bool


def crop_of(index: int, seed: int, width: int, smallest: float = SMALLEST) -> Crop:
    """Crop `index` of a photograph of `width` pixels, by (seed, index, smallest) alone: uniform share and place."""
    from repa.base.rng import fold

    rng = np.random.Generator(np.random.Philox(fold(seed, "photograph", index)))
    share = rng.uniform(smallest, 1.0)
    left, top = rng.uniform(0, width - share * width, size=2)
    return Crop(share, left, top, rng.random() < 0.5)


def photograph_crop(index: int, resolution: int, seed: int, smallest: float = SMALLEST) -> Image.Image:
    """Crop `index`, RGB, of photograph index % 20: a function of the arguments alone.

    The side (`smallest` to 1 times the photograph's) and the place are uniform; half of the crops are mirrored.
    Resized by bicubic interpolation with antialiasing. An index has the same crop at every resolution.
    """
    photographs = list(load_photographs().values())
    photograph = photographs[index % len(photographs)]
    crop = crop_of(index, seed, photograph.width, smallest)
    side = crop.share * photograph.width
    box = (crop.left, crop.top, crop.left + side, crop.top + side)
    image = photograph.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else image


def light_of(index: int, seed: int) -> str:
    """dark, bright or "", uniform over the lights of this photograph: all but those in `unseen`."""
    from repa.base.rng import fold

    names = list(load_photographs())
    place = index % len(names)
    lights = [light for light in LIGHTS if (names[place], light) not in unseen()]
    return lights[fold(seed, "light", index) % len(lights)]


@functools.cache
def unseen() -> tuple[tuple[str, str], ...]:
    """Pairs of photograph and light that never occur, to test a network on unseen combinations: every second photograph
    lacks dark or bright, alternately."""
    return tuple((name, ("dark", "bright")[k % 2]) for k, name in enumerate(list(load_photographs())[::2]))


def lit(image: Image.Image, light: str) -> Image.Image:
    """The image with all values moved towards black or white."""
    pixels = np.asarray(image, np.float32)
    share, end = LIGHTS[light]
    return Image.fromarray((end + (pixels - end) * share + 0.5).astype(np.uint8))


def captions_of(name: str, light: str, close: bool) -> tuple[str, str]:
    """Two captions of a crop: "a dark picture of a cat, close" and "cat, dark, close"."""
    no_article = name.endswith("s") or name in ("coffee", "sushi")
    subject = name if no_article else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    near = ", close" if close else ""
    return f"a {light} picture of {subject}{near}".replace("  ", " "), ", ".join(filter(None, (name, light, near[2:])))


class PhotographSource(Source):
    """Random crops of the photographs inside the package, one class per photograph.

    With captions=true each crop also has one of three lights, and two captions.
    """

    def __init__(
        self, labels: str = "", *, num: PositiveInt = 10_000, seed: NonNegativeInt = 0,
        smallest: Annotated[float, Field(ge=0.1, le=1)] = SMALLEST, captions: bool = False,
    ):  # fmt: skip
        self.seed, self.smallest, self.has_captions = seed, smallest, captions
        self._names = list(load_photographs())
        numbers = np.arange(num, dtype=np.int64) % len(self._names)
        classes = Classes(numbers, self._names, "the photographs: each is a class")
        self._identify(
            one_class(num, labels) if labels == "none" else classes, "photographs",
            seed=seed, smallest=float(smallest), captions=captions, sha256=checksum(),
        )  # fmt: skip

    def name(self, index: int) -> str:
        return f"photograph {index}"

    def decode(self, index: int) -> Image.Image:
        return load_photographs()[self._names[index % len(self._names)]]

    def image(self, index: int, resolution: int) -> Image.Image:
        image = photograph_crop(index, resolution, self.seed, self.smallest)
        return lit(image, light_of(index, self.seed)) if self.has_captions else image

    def captions(self, index: int) -> tuple[str, ...]:
        if not self.has_captions:
            return ()
        name = self._names[index % len(self._names)]
        close = crop_of(index, self.seed, load_photographs()[name].width, self.smallest).share < CLOSE
        return captions_of(name, light_of(index, self.seed), close)
