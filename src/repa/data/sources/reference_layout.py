"""The folders that REPA's own preprocessing writes: cropped images and the moments of a Stable Diffusion autoencoder.

    DATA/images/00000/img00000000.png                 RGB, square, already cropped
    DATA/vae-sd/00000/img-mean-std-00000000.npy       float32 (2C, h, w): mean, then standard deviation, unscaled
    DATA/vae-sd/dataset.json                          {"labels": [["00000/img-mean-std-00000000.npy", 3], ...]}

Images and moments are matched by the numbers in their names, never by their positions in two sorted lists.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from repa.base import files
from repa.base.arrays import load_npy
from repa.base.errors import UserError
from repa.data.config import PrepareConfig
from repa.data.sources.contract import Source, one_class
from repa.data.sources.folders import LISTING, FolderSource, scan
from repa.data.sources.labels import from_listing

IMAGES, MOMENTS = "images", "vae-sd"
IMAGE_PREFIX, MOMENTS_PREFIX = "img", "img-mean-std-"
LARGEST_DIFFERENCE = 0.05  # relative, of the means: rounding differs by less, another autoencoder by more


def require_same_moments(stored: np.ndarray, ours: np.ndarray, spec: str) -> None:
    """Compare stored moments (n, 2C, h, w) with those that the autoencoder computes from the same images.

    Raises:
        UserError: the stored moments are from another autoencoder, or from other images.
    """
    if stored.shape != ours.shape:
        raise UserError(
            f"The stored moments have shape {stored.shape[1:]}, but those of {spec} have {ours.shape[1:]}: choose the "
            "autoencoder that computed them."
        )
    mean, other = (x[:, : x.shape[1] // 2].astype(np.float64) for x in (stored, ours))
    error = float(np.sqrt(((mean - other) ** 2).mean() / (other**2).mean()))
    if not error <= LARGEST_DIFFERENCE:  # also refuses NaN
        raise UserError(
            f"The stored means differ by {error:.0%} from those that {spec} computes from the same images (rounding: "
            f"up to {LARGEST_DIFFERENCE:.0%}): choose the autoencoder that computed them, or correct the pairing."
        )


def is_reference(folder: Path) -> bool:
    """Whether a folder was written by REPA's preprocessing."""
    return (folder / IMAGES).is_dir() and (folder / MOMENTS).is_dir()


class ReferenceSource(Source):
    """Images, and the moments that were computed from them."""

    def __init__(self, root: Path, labels: str = ""):
        """
        Args:
            root: the folder that contains images/ and vae-sd/.
            labels: "" for the labels of the moments, or "none".

        Raises:
            UserError: an image without moments, moments without an image, no labels, or invalid arrays.
        """
        self.root = root
        listing = root / MOMENTS / LISTING
        if not listing.is_file():
            raise UserError(f"{listing} is missing: copy this file of labels from the original data.")
        self._images = FolderSource(root / IMAGES, "none")
        arrays = scan(root / MOMENTS, (".npy",))
        self._moments = self._paired(sorted(arrays))
        self.side = self._images.decode(0).width
        self.moments_shape = self.moments(0).shape  # later calls compare their shape with this one
        _, height, width = self.moments_shape
        if height != width or self.side % height:
            raise UserError(
                f"{self._moments[0]} has moments of {height} x {width} for images of {self.side} pixels, but they must "
                "be square and smaller by a whole factor: encode the images again."
            )
        classes = from_listing(files.read_json(listing), self._moments, str(listing))
        classes = classes._replace(origin=f"{MOMENTS}/{LISTING}")
        self._require_agreement(classes.labels)
        if labels == "none":
            classes = one_class(len(classes.labels), labels)
        digest = self._images.identity["sha256"]
        self._identify(classes, root.name, sha256=digest, moments=list(self.moments_shape))

    def require_fit(self, config: PrepareConfig) -> None:
        if config.autoencoder == "pixels":
            raise UserError(
                f"{self.root} holds moments, but the autoencoder is 'pixels': choose the one that computed them "
                f"(REPA's is sd-vae-ft-mse), or give {self.root / IMAGES} as the source to use only the images."
            )
        if config.resolution != self.side:
            raise UserError(
                f"{self.root} holds moments of images of {self.side} pixels, but the resolution is "
                f"{config.resolution}: give {self.side}, or {self.root / IMAGES} as the source to encode the images "
                "again."
            )

    def name(self, index: int) -> str:
        return f"{IMAGES}/{self._images.name(index)}"

    def decode(self, index: int) -> Image.Image:
        return self._images.decode(index)

    def image(self, index: int, resolution: int) -> Image.Image:
        """The unchanged image: its moments were computed from exactly these pixels."""
        image = self.decode(index)
        if image.size != (resolution, resolution):
            raise UserError(
                f"{self.name(index)} is {image.width} x {image.height}, but its moments are for another size: "
                f"prepare the data with --resolution {self.side}."
            )
        return image

    def moments(self, index: int) -> np.ndarray:
        """(2C, h, w) float32: mean and standard deviation, unscaled; raises UserError if the file is invalid."""
        path = self.root / MOMENTS / self._moments[index]
        array = load_npy(path, "an array")
        if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] % 2 or 0 in array.shape:
            raise UserError(f"{path} holds {array.dtype} {array.shape}, not float32 (2C, h, w): encode it again.")
        if self.moments_shape not in (None, array.shape):
            raise UserError(f"{path} holds {array.shape}, but other images have {self.moments_shape}: encode it again.")
        if not np.isfinite(array).all():
            raise UserError(f"{path} holds numbers that are not finite: encode it again.")
        if (array[array.shape[0] // 2 :] < 0).any():
            raise UserError(
                f"{path} has negative standard deviations: its second half has log-variances, which some other tools "
                "write. Encode the images with `repa prepare` instead."
            )
        return array

    def _paired(self, moments: Sequence[str]) -> list[str]:
        """The file of moments of each image, by the numbers in the names."""
        # REPA's own loader indexes two sorted lists: after one missing file, every image gets the moments of another
        images = {_number(path, IMAGE_PREFIX): path for path in self._images.paths}
        latents = {_number(path, MOMENTS_PREFIX): path for path in moments}
        for ours, others, kind, folder in ((images, latents, "moments", MOMENTS), (latents, images, "image", IMAGES)):
            alone = [path for number, path in ours.items() if number not in others]
            if alone:
                raise UserError(
                    f"{self.root} has {len(alone):,} files without their {kind} in {folder}/; the first is {alone[0]}: "
                    "finish the preprocessing, or remove them."
                )
        if not len(images) == len(latents) == len(self._images) == len(moments):
            raise UserError(f"{self.root} has two images or moments with the same number: remove one of them.")
        return [latents[_number(path, IMAGE_PREFIX)] for path in self._images.paths]

    def _require_agreement(self, labels: np.ndarray) -> None:
        """Raises UserError if images/ has labels too, and they differ from those of the moments."""
        listing = self.root / IMAGES / LISTING
        if not listing.is_file():
            return
        theirs = from_listing(files.read_json(listing), list(self._images.paths), str(listing)).labels
        if (differ := np.flatnonzero(theirs != labels)).size:
            index = int(differ[0])
            raise UserError(
                f"{self.name(index)} has the label {theirs[index]} in {IMAGES}/{LISTING}, but {labels[index]} in "
                f"{MOMENTS}/{LISTING}; {differ.size:,} labels differ: remove the file that is wrong."
            )


def _number(path: str, prefix: str) -> str:
    """'00000/img00000012.png' -> '00000/00000012'."""
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0]
    if not (stem.startswith(prefix) and stem.removeprefix(prefix).isdecimal()):
        raise UserError(f"{path} is not named like REPA's files ({prefix}NUMBER): move it out of the folder.")
    return f"{folder}{slash}{stem.removeprefix(prefix)}"
