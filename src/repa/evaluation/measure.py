"""An iterable of uint8 batches against a reference: features, then statistics, then metrics."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa import __version__
from repa.base import dist
from repa.base.errors import UserError
from repa.data import DataSet
from repa.encoders import load_encoder
from repa.encoders.contract import VisionEncoder
from repa.evaluation.config import EvaluateConfig
from repa.evaluation.reference import Reference, pooled_features, reference_of
from repa.evaluation.samples import read_samples
from repa.metrics import Statistics, frechet_distance, kernel_distance, precision_recall

NEEDS_FEATURES = {"kd", "precision", "recall"}  # the rows themselves, not only their statistics


def evaluate(
    batches: Iterable[Tensor], encoder: VisionEncoder, reference: Reference, metrics: Sequence[str] = ("fd",)
) -> dict[str, float]:
    """Metrics of uint8 batches (n, 3, H, W) by name. Under several processes each gives its own images; all get the result."""
    statistics, rows = Statistics(), []
    for features in pooled_features(batches, encoder):
        statistics.update(features)
        if NEEDS_FEATURES & set(metrics):
            rows.append(features)
    statistics.reduce()
    results: dict[str, float] = {}
    if "fd" in metrics:
        real = reference.statistics
        results["fd"] = frechet_distance(real.mean, real.covariance, statistics.mean, statistics.covariance)
    if NEEDS_FEATURES & set(metrics):
        samples = torch.cat([row for part in dist.gather_objects(rows) for row in part])
        if "kd" in metrics:
            size = min(1000, len(reference.subset), len(samples))
            results["kd"] = kernel_distance(reference.subset, samples, subset_size=size)
        if {"precision", "recall"} & set(metrics):
            found = precision_recall(reference.subset, samples)
            results |= {name: getattr(found, name) for name in ("precision", "recall") if name in metrics}
    return results


def evaluate_file(
    samples: Path,
    data: DataSet,
    config: EvaluateConfig,
    *,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure an .npz of samples (single process); the results with what they were made from."""
    file = read_samples(samples, config.batch_size)
    if file.num < 2:
        raise UserError(
            f"{samples} holds {file.num} image: a distribution needs at least two, and thousands to mean something."
        )
    if (file.height, file.width) != (data.resolution, data.resolution):
        raise UserError(
            f"{samples} holds images of {file.height}x{file.width} pixels, {data.folder} of {data.resolution}: "
            "compare what has the same size."
        )
    encoder = load_encoder(config.features, weights=config.features_weights or None, device=device)
    reference = reference_of(data, encoder, config.features)

    def counted() -> Iterable[Tensor]:
        done = 0
        for batch in file.batches:
            yield batch
            done += len(batch)
            progress(done, file.num)

    return {
        "metrics": evaluate(counted(), encoder, reference, config.metrics),
        "num_samples": file.num,
        "num_reference": reference.statistics.count,
        "samples": str(samples),
        "reference": str(data.folder),
        "encoder": dict(encoder.identity),
        "repa": __version__,
        "torch": torch.__version__,
    }
