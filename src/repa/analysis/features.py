"""Features averaged over tokens, of a run's blocks or of an encoder, for images of prepared data; computed once."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from repa.analysis.collection import Load, collect
from repa.analysis.config import FOLDER, HiddenConfig, ImagesConfig
from repa.analysis.hidden import batches, collect_hidden, device_of, latents, pixels
from repa.analysis.measures import (
    FAR,
    MAX_DISTANCE,
    correlation_decay_slope,
    local_distance_similarity,
    rms_spatial_contrast,
)
from repa.base import files
from repa.base.reporting import Progress
from repa.base.weights import digest_of
from repa.data import DataSet
from repa.encoders import Features, VisionEncoder
from repa.runs import LoadedRun, layout

PATCHES, POOLED = "patches", "pooled"  # fields of an encoder: the mean of its patches, its own summary
STRUCTURE = {"lds": local_distance_similarity, "cds": correlation_decay_slope, "rmsc": rms_spatial_contrast}
STRUCTURE_DISTANCE = {"lds": FAR, "cds": MAX_DISTANCE, "rmsc": 0}  # distance that the token grid must contain


def field(depth: int) -> str:
    """The name of a block among the fields of a run."""
    return f"depth{depth:02d}"


def hidden_of_run(
    run: LoadedRun,
    depths: Sequence[int],
    t: float,
    config: HiddenConfig,
    data: DataSet,
    indices: np.ndarray,
    progress: Progress,
) -> Load:
    """Hidden states (n, D) at noise level t by `field(depth)`: null label, mean over tokens."""

    def make(rows: range, fields: Sequence[str]) -> dict[str, torch.Tensor]:
        mine = indices[rows.start : rows.stop]
        hidden = collect_hidden(
            run.model,
            (latents(run, data, part, config.seed) for part in batches(mine, config.batch_size)),
            depths=[depth for depth in depths if field(depth) in fields],
            t=t,
            path=run.path,
            seed=config.seed,
            streams=mine.tolist(),  # by index in the data, so that a chunk computed alone has the same noise
            network_time=run.process.network_time,
        )
        return {field(depth): x for depth, x in hidden.items()}

    cache = Path(config.cache) if config.cache else _cache_of(run.folder) if run.folder else None
    facts = {"t": t, "seed": config.seed, "data": _facts_of_images(data, indices)}
    identity = {} if cache is None else {**_identity_of_run(run), **facts}  # a checksum of weights takes seconds
    fields = [field(depth) for depth in depths]
    return collect(cache, identity, fields, len(indices), make, store=config.store, progress=progress)


def _cache_of(run: Path) -> Path:
    """In the run's folder, or in the user's cache if the run's folder is read-only."""
    files.refuse_links(run)
    own = run / FOLDER / "cache"
    there = next(folder for folder in (own, *own.parents) if folder.exists())
    return own if os.access(there, os.W_OK) else files.cache_folder() / FOLDER


def features_of_encoder(
    encoder: VisionEncoder,
    spec: str,
    grid: int,
    names: Sequence[str],
    config: ImagesConfig,
    data: DataSet,
    indices: np.ndarray,
    progress: Progress,
) -> Load:
    """Features (n, D) of an encoder, by name: "patches", the mean over its patches; "pooled", its own; "lds" ... (n, 1)."""

    def make(rows: range, fields: Sequence[str]) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in fields}
        for part in batches(indices[rows.start : rows.stop], config.batch_size):
            features = encoder(pixels(data, part), grid)  # once for all fields
            for name in fields:
                found[name].append(of(features, name))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def of(features: Features, name: str) -> torch.Tensor:
        if name == PATCHES:
            return features.patches.float().mean(1).cpu()  # (n, D)
        if name == POOLED:
            assert features.pooled is not None  # see `features_in`
            return features.pooled.float().cpu()
        return STRUCTURE[name](features.patches)[:, None].cpu()  # (n, 1)

    cache = Path(config.cache) if config.cache else files.cache_folder() / FOLDER
    identity = {"encoder": encoder.identity, "spec": spec, "grid": grid, "data": _facts_of_images(data, indices)}
    return collect(cache, identity, names, len(indices), make, store=config.store, progress=progress)


def features_in(encoder: VisionEncoder, data: DataSet, grid: int) -> list[str]:
    """ "patches", and "pooled" if the encoder has a pooled vector."""
    first = encoder(pixels(data, np.arange(1)), grid)
    return [PATCHES] if first.pooled is None else [PATCHES, POOLED]


def _identity_of_run(run: LoadedRun) -> dict[str, Any]:
    """The checksum of the weights, not their file name: a step may be trained again."""
    return {
        "weights": run.weights_sha256 or digest_of(run.model.state_dict()),
        "model": layout.read_config(run.folder)["model"] if run.folder else {},
        "diffusion": run.diffusion.model_dump(mode="json"),
        "autoencoder": run.autoencoder.identity,
        "device": device_of(run).type,
    }


def _facts_of_images(data: DataSet, indices: np.ndarray) -> dict[str, Any]:
    return {**data.summary(), "rows": hashlib.sha256(indices.tobytes()).hexdigest()}
