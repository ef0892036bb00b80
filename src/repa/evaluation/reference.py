"""References: statistics of real images and the features of a subset, computed once and stored."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, faults, files
from repa.base.arrays import load_npz, save_npz
from repa.base.errors import UserError
from repa.base.reporting import Progress, silent
from repa.data import DataSet
from repa.encoders.contract import VisionEncoder
from repa.evaluation.extractors import Extractor, as_extractor
from repa.evaluation.images import DataImages, Images, gather_rows
from repa.metrics import Statistics

BATCH = 64
SUBSET = 10_000  # images for nearest neighbours and kernel distances, as many as the ADM evaluator's reference has


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
