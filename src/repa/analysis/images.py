"""The images that an analysis looks at: rows of prepared data, as pixels and as a run's clean latents."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repa.analysis.hidden import require_latents_alone
from repa.base.errors import UserError
from repa.base.rng import SampleStreams, fold
from repa.data import DataSet
from repa.models import Tap
from repa.runs import LoadedRun


def spread(data: DataSet, num: int) -> np.ndarray:
    """`num` rows evenly over the data, which lies class by class; all when num is 0 or more than there are. No mirrored copies."""
    originals = data.originals
    return originals.start + originals.step * evenly(len(originals), num or len(originals))


def evenly(total: int, num: int) -> np.ndarray:
    """At most `num` of the numbers 0 to total - 1, evenly spaced, ascending: int64."""
    return np.unique(np.linspace(0, total - 1, min(num, total)).round().astype(np.int64))


def batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def pixels(data: DataSet, indices: np.ndarray) -> Tensor:
    """uint8 (n, 3, R, R)."""
    if not data.has_images:
        raise UserError(f"{data.folder} holds no images: prepare it with --store-images true.")
    return torch.from_numpy(data.gather("images", indices))


@torch.inference_mode()
def latents(run: LoadedRun, data: DataSet, indices: np.ndarray, seed: int) -> Tensor:
    """Clean latents (n, C, h, w) on the run's device, drawn from the posterior by a stream per image."""
    if data.has_moments:
        moments = torch.from_numpy(data.gather("moments", indices)).float().to(device_of(run))
    else:
        moments = run.autoencoder.encode(pixels(data, indices).to(device_of(run)))
    streams = SampleStreams(fold(seed, "posterior"), indices, moments.device)
    return run.autoencoder.sample(moments, noise=streams.randn(run.autoencoder.channels, *moments.shape[2:]))


def check_run(run: LoadedRun, data: DataSet, depths: Sequence[int]) -> tuple[int, ...]:
    """The depths asked for, or all that can be tapped. Refuses others, a run with streams, and data that the run cannot read."""
    require_latents_alone(run.model)
    depths = tuple(depths) or tuple(range(1, run.model.tapped_depth + 1))
    for depth in depths:
        run.model.checked(Tap(depth))
    if not data.has_moments:
        pixels(data, np.arange(0))
    stored = data.manifest.autoencoder if data.has_moments else {}
    own = run.autoencoder.identity
    if different := [key for key in ("sha256", "scale", "shift") if key in stored and stored[key] != own[key]]:
        raise UserError(
            f"{data.folder} holds latents of {stored['name']}, but the run was trained on those of {own['name']} "
            f"(different: {', '.join(different)}): give data prepared with --autoencoder {own['name']}."
        )
    side = run.latent_shape[-1]
    its_side = data.latent_size if data.has_moments else data.resolution // run.autoencoder.factor
    if side != its_side:
        raise UserError(
            f"{data.folder} has latents of side {its_side} for this run, which was trained on {side}: "
            f"give data prepared with --resolution {side * run.autoencoder.factor}."
        )
    return depths


def device_of(run: LoadedRun) -> torch.device:
    return next(run.model.parameters()).device
