"""Which row of the paper a run trains as, and whether it was measured as that was."""

from collections.abc import Mapping, Sequence
from typing import Any

from repa.alignment.config import AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.report.paper import AUTOENCODER, CLASSES, FACTOR, IMAGES, REFERENCE, ROWS, SAMPLES, SAMPLINGS, Row
from repa.report.protocols import INCEPTION, Protocol, settings_of
from repa.report.records import RunRecord


def row_of(run: RunRecord) -> tuple[str, Row] | None:
    """The row that a run trains as: the same network, alignment and batch, on latents of as many classes; else None."""
    return next(((name, row) for name, row in ROWS.items() if _trains_as(run, row)), None)


def _trains_as(run: RunRecord, row: Row) -> bool:
    model, diffusion = run.config.get("model") or {}, run.config.get("diffusion") or {}
    network = ModelConfig(name=row.model, latent_size=row.resolution // FACTOR, num_classes=CLASSES)
    asked = network.model_dump(mode="json", exclude={"latent_channels"})
    same_network = {**asked, **model, "latent_channels": None} == {**asked, "latent_channels": None}
    objective = DiffusionConfig(objective=row.objective).model_dump(mode="json")
    same_objective = {**objective, "objective": "flow", **diffusion} == objective
    same_batch = run.config.get("batch_size") == 256
    return same_network and same_objective and same_batch and _same_alignment(run.alignments, row.alignment)


def _same_alignment(found: Sequence[Mapping[str, Any]], asked: Mapping[str, Any] | None) -> bool:
    """Is there just the one term of the row (or none), with the paper's projector, constant in time?"""
    if asked is None:
        return not found
    whole = AlignmentConfig(**asked).model_dump(mode="json")
    return len(found) == 1 and {**whole, **found[0]} == whole


def measured_as(protocol: Protocol, run: RunRecord) -> str | None:
    """The name in SAMPLINGS that an evaluation of a run was made by; None where it was made in any other way."""
    given = settings_of(protocol)
    asked = {
        "features": INCEPTION,
        "num_samples": SAMPLES,
        "labels": "uniform",
        "weights": "ema",
        "decoder": AUTOENCODER,
        "reference": REFERENCE,
    }
    data = run.data
    same_data = (data.get("num_images"), data.get("resolution")) == (IMAGES, 256)
    if not same_data or any(given.get(key) != value for key, value in asked.items()):
        return None
    for name, sampling in SAMPLINGS.items():
        same_sampler = all(given.get(key) == sampling[key] for key in ("sampler", "steps"))
        if same_sampler and given.get("guidance") == sampling.get("guidance", "off"):
            return name
    return None
