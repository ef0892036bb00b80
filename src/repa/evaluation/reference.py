"""References: statistics of real images and the features of a subset of them, stored once computed."""

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


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D), float64, and of how many images: None where a file does not say."""

    mean: Tensor
    covariance: Tensor
    count: int | None  # type: ignore[assignment]  # nobody asks a tuple of moments for its count

    @classmethod
    def of(cls, statistics: Statistics) -> "Moments":
        return cls(statistics.mean.cpu(), statistics.covariance.cpu(), statistics.count)


class Reference(NamedTuple):
    """Moments of all reference images, and the features of at most SUBSET evenly spaced ones of them."""

    statistics: Moments
    subset: Tensor | None  # (M, D) float32; None where a file has moments only
    spatial: Moments | None = None  # of Inception's spatial features

    def arrays(self) -> dict[str, np.ndarray]:
        """mu, sigma, mu_s, sigma_s: the names of the ADM evaluator's files; and count and subset."""
        arrays = {"mu": self.statistics.mean, "sigma": self.statistics.covariance}
        if self.subset is not None:
            arrays["subset"] = self.subset
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        return {name: tensor.numpy() for name, tensor in arrays.items()} | {"count": np.array(self.statistics.count)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Reference":
        """Of ours, or of the ADM evaluator, whose files have no count and no subset; ValueError where they do not fit together."""
        count = int(arrays["count"]) if "count" in arrays else None

        def moments(mu: str, sigma: str) -> Moments:
            mean, covariance = (torch.from_numpy(_finite(arrays, name).astype(np.float64)) for name in (mu, sigma))
            if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
                raise ValueError(f"{mu} {tuple(mean.shape)} and {sigma} {tuple(covariance.shape)} do not fit together")
            return Moments(mean, covariance, count)

        subset = torch.from_numpy(_finite(arrays, "subset").astype(np.float32)) if "subset" in arrays else None
        if subset is not None and subset.shape[1:] != arrays["mu"].shape:
            raise ValueError(f"subset {tuple(subset.shape)} and mu {arrays['mu'].shape} do not fit together")
        return cls(moments("mu", "sigma"), subset, moments("mu_s", "sigma_s") if "mu_s" in arrays else None)


def _finite(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    array = arrays[name]  # of a file from anyone
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{name} has values that are not finite")
    return array


def reference_of(
    data: DataSet, encoder: VisionEncoder | Extractor, spec: str, progress: Progress = silent
) -> Reference:
    """The reference of prepared data, computed once by all processes and kept in the data's folder.

    `spec` is what the encoder was loaded by: its settings are part of what it computes, as its weights are.
    """
    return kept_reference(DataImages(data), as_extractor(encoder), spec, progress=progress)


def kept_reference(
    images: Images, extractor: Extractor, spec: str, *, batch_size: int = BATCH, progress: Progress = silent
) -> Reference:
    """The reference of any images: what was kept of them, else computed by all processes and kept.

    It is kept in the images' own folder, or in the cache folder where they have none or it cannot be written; nowhere, when
    that cannot be written either.
    """
    path = _kept_path(images, extractor, spec)
    # The main process looks for all: were the file seen by some alone, the others would wait for them for ever.
    if dist.from_main(path.is_file()):
        return _read_kept(path)
    reference = compute_reference(images, extractor, batch_size, progress)
    if dist.is_main():
        # Where nothing can be written the next command computes it again.
        with contextlib.suppress(UserError, FileNotFoundError):
            save_npz(path, reference.arrays())
    return reference


def compute_reference(
    images: Images, extractor: Extractor, batch_size: int = BATCH, progress: Progress = silent
) -> Reference:
    """Every process looks at its share of the images; all get the whole."""
    statistics, spatial = (Statistics(accumulator_of(extractor)) for _ in range(2))
    chosen = torch.from_numpy(subset_of(images.num))  # evenly spaced, as prepared data lies class by class
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
    return Reference(Moments.of(statistics), gather_rows(kept, places), Moments.of(spatial) if spatial.count else None)


def subset_of(num: int) -> np.ndarray:
    """Indices of at most SUBSET evenly spaced images of `num`."""
    size = min(SUBSET, num)
    return np.arange(size) * num // max(size, 1)


def accumulator_of(extractor: Extractor) -> torch.device:
    """Where float64 sums are kept: with the features on a GPU, otherwise on the CPU (MPS has no float64)."""
    return extractor.device if extractor.device.type == "cuda" else torch.device("cpu")


def _kept_path(images: Images, extractor: Extractor, spec: str) -> Path:
    # What the file is a function of: an extractor of other weights, settings or arithmetic gets another file.
    key = [spec, extractor.identity]
    if images.home is not None:
        folder = images.home / "reference"
        path = folder / _file_name(extractor, key)
        if path.is_file() or os.access(folder if folder.exists() else images.home, os.W_OK):
            return path
    # In the shared cache the images are part of the name too; in their own folder they need not be.
    return files.cache_folder() / "reference" / _file_name(extractor, [*key, images.identity])


def _file_name(extractor: Extractor, key: list) -> str:
    return f"{extractor.name}-{files.json_sha256(key)[:12]}.npz"


def _read_kept(path: Path) -> Reference:
    again = "Delete it; it will be computed again."
    arrays = load_npz(path, "a reference", remedy=again)
    with faults.reading(path, "a reference", again):
        return Reference.from_arrays(arrays)
