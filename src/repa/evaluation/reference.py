"""References: statistics of real images and the features of a subset, computed once and stored.

Their files have the format of the ADM evaluator; files of other programs in this format are read too.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, faults, files
from repa.base.arrays import load_npz, save_npz, write_images
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.encoders.contract import VisionEncoder
from repa.evaluation.config import INCEPTION
from repa.evaluation.extractors import Extractor, InceptionExtractor, as_extractor
from repa.evaluation.images import DataImages, Images, NpzImages, gather_rows, open_images
from repa.metrics import Statistics

BATCH = 64
SUBSET = 10_000  # images for nearest neighbours and kernel distances, as many as the ADM evaluator's reference has
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s", "count", "subset")
OURS = ("extractor", "resolution")


class MeanCovariance(NamedTuple):
    """Mean (D,) and covariance (D, D), float64, and the number of images; None if a file does not record it."""

    mean: Tensor
    covariance: Tensor
    count: int | None  # type: ignore[assignment]  # shadows tuple.count, which is not needed here

    @classmethod
    def of(cls, statistics: Statistics) -> "MeanCovariance":
        return cls(statistics.mean.cpu(), statistics.covariance.cpu(), statistics.count)


class Reference(NamedTuple):
    """Mean and covariance of all reference images, and the features of at most SUBSET evenly spaced images."""

    statistics: MeanCovariance
    subset: Tensor | None  # (M, D) float32; None if a file has no features
    spatial: MeanCovariance | None = None  # of Inception's spatial features

    def arrays(self) -> dict[str, np.ndarray]:
        """mu, sigma, mu_s, sigma_s, as in the ADM evaluator's files, and count and subset."""
        arrays = {"mu": self.statistics.mean, "sigma": self.statistics.covariance}
        if self.subset is not None:
            arrays["subset"] = self.subset
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        return {name: tensor.numpy() for name, tensor in arrays.items()} | {"count": np.array(self.statistics.count)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Reference":
        """From arrays of this package, or of the ADM evaluator without count and subset; raises ValueError if shapes do not match."""
        count = whole_number(arrays, "count") if "count" in arrays else None

        def mean_covariance(mu: str, sigma: str) -> MeanCovariance:
            mean, covariance = (torch.from_numpy(_finite(arrays, name).astype(np.float64)) for name in (mu, sigma))
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(
                    f"the shapes of {mu} {tuple(mean.shape)} and {sigma} {tuple(covariance.shape)} do not match"
                )
            # Up to the rounding of half precision. A Cholesky factor shows negative eigenvalues and is cheap.
            slack = 1e-3 * max(covariance.diagonal().max().item(), 1e-30)
            symmetric = torch.allclose(covariance, covariance.T, rtol=0, atol=slack)
            if not symmetric or torch.linalg.cholesky_ex(covariance + slack * torch.eye(len(mean))).info:
                raise ValueError(f"{sigma} is not a covariance: it is not symmetric, or has negative eigenvalues")
            return MeanCovariance(mean, covariance, count)

        subset = torch.from_numpy(_finite(arrays, "subset").astype(np.float32)) if "subset" in arrays else None
        if subset is not None and subset.shape[1:] != arrays["mu"].shape:
            raise ValueError(f"the shapes of subset {tuple(subset.shape)} and mu {arrays['mu'].shape} do not match")
        if subset is not None and count is not None and len(subset) > count:
            raise ValueError(f"subset has {len(subset):,} images, more than its count {count:,}")
        return cls(
            mean_covariance("mu", "sigma"), subset, mean_covariance("mu_s", "sigma_s") if "mu_s" in arrays else None
        )


def whole_number(arrays: dict[str, np.ndarray], name: str) -> int:
    """An array of a single whole number, at least 0; raises ValueError for another."""
    array = arrays[name]
    if array.dtype.kind not in "iu" or array.size != 1 or array.item() < 0:
        raise ValueError(f"{name} must be a whole number, but is {array.tolist()!r:.80}")
    return int(array.item())


def _finite(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = arrays[name]  # from an untrusted file
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite floating-point numbers")
    return array


def reference_of(
    data: DataSet, encoder: VisionEncoder | Extractor, spec: str, progress: Progress = silent
) -> Reference:
    """The reference of prepared data, computed once by all processes and stored in the data's folder.

    `spec` is the spec of the encoder: the features depend on its settings and its weights.
    """
    return kept_reference(DataImages(data), as_extractor(encoder), spec, progress=progress)


def kept_reference(
    images: Images, extractor: Extractor, spec: str, *, batch_size: int = BATCH, progress: Progress = silent
) -> Reference:
    """The reference of any images: read from storage, or computed by all processes and stored.

    It is stored in the images' folder, or in the cache folder if there is none or it is read-only; it is not stored if the
    cache folder is read-only too.
    """
    path = _kept_path(images, extractor, spec)
    # Only the main process looks: if only some processes saw the file, they would not join the computation of the others.
    if dist.from_main(path.is_file()):
        return _read_kept(path)
    reference = compute_reference(images, extractor, batch_size, progress)
    if dist.is_main():
        # If nothing can be written, the next command computes it again.
        with contextlib.suppress(UserError, FileNotFoundError):
            save_npz(path, reference.arrays())
    return reference


def compute_reference(
    images: Images, extractor: Extractor, batch_size: int = BATCH, progress: Progress = silent
) -> Reference:
    """Every process reads its share of the images; all receive the full reference."""
    statistics, spatial = (Statistics(accumulator_of(extractor)) for _ in range(2))
    chosen = torch.from_numpy(subset_of(images.num))  # evenly spaced, because prepared data is ordered by class
    kept, places = [], []
    for indices, pixels in images.batches(batch_size):
        seen = extractor(pixels)
        statistics.update(seen.pooled)
        if seen.spatial is not None:
            spatial.update(seen.spatial)
        wanted = torch.isin(indices, chosen)
        kept.append(seen.pooled.cpu()[wanted])
        places.append(indices[wanted])
        progress(min(int(indices[0]) + dist.world() * batch_size, images.num), images.num)
    statistics.reduce()
    spatial.reduce()
    return Reference(
        MeanCovariance.of(statistics), gather_rows(kept, places), MeanCovariance.of(spatial) if spatial.count else None
    )


def subset_of(num: int) -> np.ndarray:
    """Indices of at most SUBSET of `num` images, evenly spaced."""
    size = min(SUBSET, num)
    return np.arange(size) * num // max(size, 1)


def accumulator_of(extractor: Extractor) -> torch.device:
    """Device of the float64 sums: that of the features on a GPU, otherwise the CPU (MPS has no float64)."""
    return extractor.device if extractor.device.type == "cuda" else torch.device("cpu")


def _kept_path(images: Images, extractor: Extractor, spec: str) -> Path:
    # A change of the extractor's weights, settings or precision needs another file. So does one of the images: in their
    # own folder too, where a copy of other data may have replaced them.
    name = f"{extractor.name}-{files.json_sha256([spec, extractor.identity, images.identity])[:12]}.npz"
    if images.home is not None:
        folder = images.home / "reference"
        is_writable = os.access(folder if folder.exists() else images.home, os.W_OK)
        # through a link of a stranger's data nothing is written
        if not folder.is_symlink() and ((folder / name).is_file() or is_writable):
            return folder / name
    return files.cache_folder() / "reference" / name


def _read_kept(path: Path) -> Reference:
    again = "Delete it; it will be computed again."
    arrays = load_npz(path, "a reference", remedy=again)
    with faults.reading(path, "a reference", again):
        return Reference.from_arrays(arrays)


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
