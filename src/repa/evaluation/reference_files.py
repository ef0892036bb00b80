"""Reference files of the ADM evaluator and of this package, in the same format."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from repa.base import faults, files
from repa.base.arrays import load_npz, write_images
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.evaluation.config import INCEPTION
from repa.evaluation.extractors import Extractor, InceptionExtractor
from repa.evaluation.images import Images, NpzImages, open_images
from repa.evaluation.reference import BATCH, Reference, kept_reference, subset_of, whole_number

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s", "count", "subset")
OURS = ("extractor", "resolution")


class ReferenceFile:
    """An .npz with mu and sigma, and optionally mu_s, sigma_s and images under arr_0: opened, with its small arrays read.

    Files of this package also record the extractor (JSON), the number of images and their resolution, and store the features
    of the subset. ADM's files have none of these; their features are Inception's with the published weights.
    """

    def __init__(self, path: Path, names: list[str]):
        self.path, self.where = path, str(path)
        arrays = load_npz(path, "a reference", (*MOMENTS, *OURS))
        self.arrays = {name: arrays[name] for name in MOMENTS if name in arrays}
        with faults.reading(path, "a reference"):
            self.extractor = json.loads(str(arrays["extractor"])) if "extractor" in arrays else None
            self.resolution = whole_number(arrays, "resolution") if "resolution" in arrays else None
            if self.extractor is not None and not (
                isinstance(self.extractor, list) and len(self.extractor) == 2 and isinstance(self.extractor[1], dict)
            ):
                raise ValueError("the extractor is not recorded")
        self.images = NpzImages(path) if "arr_0" in names else None
        if self.images is not None:  # ADM's files do not record the resolution, but their images show it
            self.resolution = self.images.height
        if "sigma" not in self.arrays or ("mu_s" in self.arrays) != ("sigma_s" in self.arrays):
            raise UserError(
                f"{path} is not a reference: it has {', '.join(names)}, but mu and sigma belong together. "
                "Give a file with both."
            )

    def load(self, extractor: Extractor, spec: str, batch_size: int, progress: Progress) -> Reference:
        """Raises UserError if the statistics are not of `extractor`'s features."""
        # ADM's file with an encoder: its moments do not apply, but its images do.
        if self.extractor is None and not isinstance(extractor, InceptionExtractor):
            if self.images is None:
                raise UserError(
                    f"{self.path} has only statistics of Inception's features and no images, so it cannot be used "
                    f"with the features of {spec}: choose --features {INCEPTION} or another reference."
                )
            return kept_reference(self.images, extractor, spec, batch_size=batch_size, progress=progress)
        if self.extractor is None and isinstance(extractor, InceptionExtractor) and not extractor.is_published:
            raise UserError(
                f"{self.path} has statistics from the published weights of Inception, but --features-weights names others: "
                "make a reference with these weights with `repa evaluate reference`, or leave --features-weights out."
            )
        if self.extractor is not None and self.extractor != [spec, extractor.identity]:
            raise UserError(
                f"{self.path} has {_named(*self.extractor)}, but the samples use {_named(spec, extractor.identity)}: "
                "give the same --features, --features-weights and --features-precision."
            )
        with faults.reading(self.path, "a reference"):
            reference = Reference.from_arrays(self.arrays)
        if len(reference.statistics.mean) != extractor.dim:
            raise UserError(
                f"{self.path} is not a reference for {spec}: its mu has {len(reference.statistics.mean)} entries, "
                f"but the features have {extractor.dim}. Give a reference of the same features."
            )
        # ADM's file has the images for precision and recall; their features are computed here once.
        if reference.subset is None and self.images is not None:
            seen = kept_reference(self.images, extractor, spec, batch_size=batch_size, progress=progress)
            reference = reference._replace(subset=seen.subset)
        return reference


def _named(spec: str, identity: dict[str, Any]) -> str:
    arithmetic = f", {identity['precision']}" if "precision" in identity else ""
    return f"features of {spec} (weights {str(identity.get('weights_sha256'))[:12]}{arithmetic})"


def checksum_of(opened: Images | ReferenceFile) -> str:
    """Checksum that distinguishes references of the same name: of the mean in a file, or of the images' identity.

    Computed statistics are not part of it, because their last digits differ between machines.
    """
    if isinstance(opened, ReferenceFile):
        return hashlib.sha256(opened.arrays["mu"].tobytes()).hexdigest()
    return files.json_sha256(opened.identity)


def open_reference(where: str | Path, side: int) -> ReferenceFile | Images:
    """Open the reference for images of `side` pixels, without slow work.

    Args:
        where: an .npz of the ADM evaluator or of `repa evaluate reference`; prepared data; images in an .npz, a folder or a
            zip, which are cropped to `side` where they are files.

    Raises:
        UserError: the reference is missing, unreadable, or of another resolution.
    """
    path = Path(where)
    found: ReferenceFile | Images | None = None
    if path.suffix == ".npz" and path.is_file():
        with faults.reading(path, "a reference"), zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "mu" in names:
            found = ReferenceFile(path, names)
    if found is None:
        found = open_images(where, resolution=side)
    sizes = {found.height, found.width} if isinstance(found, Images) else {found.resolution or side}
    if sizes != {side}:
        raise UserError(
            f"The samples have {side} pixels, but {where} has {' x '.join(map(str, sorted(sizes)))}: "
            "compare images of the same size."
        )
    return found


def load_reference(
    opened: ReferenceFile | Images,
    extractor: Extractor,
    spec: str,
    batch_size: int = BATCH,
    progress: Progress = silent,
) -> Reference:
    """The reference in `extractor`'s features: read, or computed by all processes and stored."""
    if isinstance(opened, ReferenceFile):
        return opened.load(extractor, spec, batch_size, progress)
    return kept_reference(opened, extractor, spec, batch_size=batch_size, progress=progress)


def write_reference(path: Path, reference: Reference, images: Images, extractor: Extractor, spec: str) -> None:
    """An .npz that the ADM evaluator can read too: it needs the images of the subset, uint8 (M, H, W, 3) under arr_0."""
    arrays = reference.arrays() | {
        "extractor": np.array(json.dumps([spec, extractor.identity])),
        "resolution": np.array(images.height),
    }
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        # ADM's evaluator computes precision and recall from images with its own Inception; for an encoder they are not needed.
        if isinstance(extractor, InceptionExtractor):
            chosen = subset_of(images.num)
            rows = (images.rows(chosen[start : start + BATCH]) for start in range(0, len(chosen), BATCH))
            parts = (pixels.permute(0, 2, 3, 1).numpy() for pixels in rows)  # (n, H, W, 3)
            write_images(archive, (len(chosen), images.height, images.width, 3), parts)
