"""What samples are measured against: statistics and a subset of the pooled features of real images."""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa.base import dist, files
from repa.base.errors import UserError
from repa.data import DataSet
from repa.encoders.contract import VisionEncoder
from repa.metrics import Statistics

BATCH = 256
SUBSET = 10_000  # images for nearest neighbours and kernel distances, as many as the ADM evaluator's reference has


@dataclass(frozen=True)
class Reference:
    """Statistics of all reference images, and the pooled features of at most SUBSET evenly spaced ones of them."""

    statistics: Statistics
    subset: Tensor  # (M, D) float32


@torch.inference_mode()
def pooled_features(batches: Iterable[Tensor], encoder: VisionEncoder) -> Iterator[Tensor]:
    """Pooled features (n, D), float32 on the CPU, of uint8 batches (n, 3, H, W) at the encoder's own grid for their size."""
    for images in batches:
        pooled = encoder(images, encoder.grid_for(images.shape[-1])).pooled
        if pooled is None:
            raise UserError(f"The encoder {encoder.name} has no pooled features to compare images by: choose another.")
        yield pooled.float().cpu()


def reference_of(data: DataSet, encoder: VisionEncoder, spec: str) -> Reference:
    """The reference of prepared data, computed once per encoder by the main process and kept in the data's folder.

    `spec` is what the encoder was loaded by: its settings are part of what it computes, as its weights are.
    """
    key = hashlib.sha256(json.dumps([spec, encoder.identity], sort_keys=True).encode()).hexdigest()[:12]
    path = data.folder / "reference" / f"{encoder.name}-{key}.npz"
    if dist.is_main() and not path.is_file():
        _write(path, _compute(data, encoder))
    dist.barrier()
    return _read(path)


def _compute(data: DataSet, encoder: VisionEncoder) -> Reference:
    if not data.has_images:
        raise UserError(f"{data.folder} holds no images to measure against: prepare it with --store-images true.")
    statistics, subset = Statistics(), []
    stride = -(-data.num_images // SUBSET)
    starts = range(0, data.num_images, BATCH)
    batches = (torch.from_numpy(data.gather("images", np.arange(s, min(s + BATCH, data.num_images)))) for s in starts)
    for start, features in zip(starts, pooled_features(batches, encoder), strict=True):
        statistics.update(features)
        subset.append(features[-start % stride :: stride])  # rows whose index in the data is a multiple of the stride
    return Reference(statistics, torch.cat(subset))


def _write(path: Path, reference: Reference) -> None:
    with files.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **reference.statistics.state_dict(), subset=reference.subset.numpy())


def _read(path: Path) -> Reference:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Reference(Statistics.from_state_dict(dict(archive)), torch.from_numpy(archive["subset"]))
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is computed again.") from None
