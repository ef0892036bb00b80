"""Real images without a download: random crops of the photographs that scikit-image and scikit-learn ship."""

import functools
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from repa.base.errors import UserError
from repa.base.images import decode_image
from repa.base.rng import fold
from repa.data.sources.contract import Source

SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets/images")
PHOTOGRAPHS = {  # class name -> where its file lies
    "astronaut": (*SKIMAGE, "astronaut.png"),
    "brick": (*SKIMAGE, "brick.png"),
    "camera": (*SKIMAGE, "camera.png"),
    "cell": (*SKIMAGE, "cell.png"),
    "chelsea": (*SKIMAGE, "chelsea.png"),
    "china": (*SKLEARN, "china.jpg"),
    "coffee": (*SKIMAGE, "coffee.png"),
    "coins": (*SKIMAGE, "coins.png"),
    "flower": (*SKLEARN, "flower.jpg"),
    "grass": (*SKIMAGE, "grass.png"),
    "gravel": (*SKIMAGE, "gravel.png"),
    "hubble_deep_field": (*SKIMAGE, "hubble_deep_field.jpg"),
    "ihc": (*SKIMAGE, "ihc.png"),
    "moon": (*SKIMAGE, "moon.png"),
    "motorcycle": (*SKIMAGE, "motorcycle_left.png"),
    "retina": (*SKIMAGE, "retina.jpg"),
    "rocket": (*SKIMAGE, "rocket.jpg"),
}
SMALLEST, LARGEST = 40, 0.6  # side of a crop: pixels; share of the photograph's shorter side


@functools.cache
def load_photographs() -> tuple[Image.Image, ...]:
    """The photographs as RGB, in the order of PHOTOGRAPHS.

    Files are read directly: scikit-image's own loaders would go to the network for one that is missing, which is a
    UserError here.
    """
    return tuple(_load(name, *where) for name, where in PHOTOGRAPHS.items())


def _load(name: str, package: str, folder: str, file: str) -> Image.Image:
    spec = find_spec(package)  # without importing it, which takes a second
    path = Path(spec.origin).parent / folder / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"The photograph {name!r} is missing: the installed {package} does not hold {folder}/{file}. "
            "Install scikit-image and scikit-learn, or give a folder of images."
        )
    return decode_image(path.read_bytes(), file)


def photograph_crop(index: int, resolution: int, seed: int) -> Image.Image:
    """Crop `index` of photograph index % 17, a function of (seed, index, resolution) alone, RGB.

    The side is log-uniform between 40 pixels and 60 % of the shorter side (each octave is as frequent as the
    next), the place uniform; bicubic with antialiasing; mirrored with probability 1/2. The same index shows the same
    crop at every resolution.
    """
    photograph = load_photographs()[index % len(PHOTOGRAPHS)]
    rng = np.random.Generator(np.random.Philox(fold(seed, "photograph", index)))
    side = math.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST * min(photograph.size))))
    left, top = rng.uniform(0, photograph.width - side), rng.uniform(0, photograph.height - side)
    box = (left, top, left + side, top + side)
    crop = photograph.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


class PhotographSource(Source):
    """Random crops of the built-in photographs, one class for each photograph."""

    def __init__(self, *, num: int = 10_000, seed: int = 0):
        for key, value, least in (("num", num, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise UserError(f"photographs:{key} was given {value!r}: it is an integer of at least {least}.")
        load_photographs()
        self.seed = seed
        self.class_names = list(PHOTOGRAPHS)
        self.labels = np.arange(num, dtype=np.int64) % len(PHOTOGRAPHS)
        self.identity = {"name": "photographs", "num_images": num, "seed": seed}

    def name(self, index: int) -> str:
        return f"photograph {index}"

    def decode(self, index: int) -> Image.Image:
        return load_photographs()[index % len(PHOTOGRAPHS)]

    def image(self, index: int, resolution: int) -> Image.Image:
        return photograph_crop(index, resolution, self.seed)
