"""Real images without a download: random crops of the photographs inside the package."""

import functools
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.base.rng import fold
from repa.data.sources.contract import Source

FOLDER = Path(__file__).parents[1] / "photographs"  # CC0; ATTRIBUTION.md there says where each comes from
SHARES = (0.6, 1.0)  # side of a crop over the photograph's: large enough to tell what it shows


@functools.cache
def load_photographs() -> dict[str, Image.Image]:
    """Class name -> photograph, RGB, square, in the order of the names."""
    files = {path.stem.replace("-", " "): path for path in sorted(FOLDER.glob("*.jpg"))}
    return {name: decode_image(path.read_bytes(), path.name) for name, path in files.items()}


@functools.cache
def checksum() -> str:
    """sha256 of all photographs' pixels: data prepared from other ones is not continued."""
    digest = hashlib.sha256()
    for photograph in load_photographs().values():
        digest.update(photograph.tobytes())
    return digest.hexdigest()


def photograph_crop(index: int, resolution: int, seed: int) -> Image.Image:
    """Crop `index`, RGB, of photograph index % 20: a function of (seed, index, resolution) alone.

    The side is uniform between 60 % and 100 % of the photograph's, the place uniform; bicubic with antialiasing; mirrored
    with probability 1/2. The same index shows the same crop at every resolution.
    """
    photographs = list(load_photographs().values())
    photograph = photographs[index % len(photographs)]
    rng = np.random.Generator(np.random.Philox(fold(seed, "photograph", index)))
    side = rng.uniform(*SHARES) * photograph.width
    left, top = rng.uniform(0, photograph.width - side, size=2)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


class PhotographSource(Source):
    """Random crops of the photographs inside the package, one class for each photograph."""

    def __init__(self, *, num: int = 10_000, seed: int = 0):
        for key, value, least in (("num", num, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise UserError(f"photographs:{key} was given {value!r}: it is an integer of at least {least}.")
        self.seed = seed
        self.class_names = list(load_photographs())
        self.labels = np.arange(num, dtype=np.int64) % len(self.class_names)
        self.identity = {"name": "photographs", "num_images": num, "seed": seed, "sha256": checksum()}

    def name(self, index: int) -> str:
        return f"photograph {index}"

    def decode(self, index: int) -> Image.Image:
        return load_photographs()[self.class_names[index % len(self.class_names)]]

    def image(self, index: int, resolution: int) -> Image.Image:
        return photograph_crop(index, resolution, self.seed)
