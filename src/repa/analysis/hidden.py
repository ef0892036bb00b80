"""Prepared data as a run's network sees it: clean latents, noised latents, and the hidden states of the blocks."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from repa.base.arrays import evenly_spaced
from repa.base.errors import UserError
from repa.base.rng import SampleStreams, fold
from repa.data import DataSet
from repa.diffusion import Interpolant, interpolate
from repa.models import Backbone, Condition, Tap
from repa.runs import LoadedRun


def spaced_rows(data: DataSet, num: int) -> np.ndarray:
    """Indices of `num` evenly spaced images, without mirrored copies; all if num is 0 or too large."""
    # Evenly spaced, not random: the data is ordered by class, so each class has its share.
    originals = data.originals
    return originals.start + originals.step * evenly_spaced(len(originals), num or len(originals))


def batches(indices: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (indices[start : start + size] for start in range(0, len(indices), size))


def pixels(data: DataSet, indices: np.ndarray) -> Tensor:
    """uint8 (n, 3, R, R)."""
    data.require_images()
    return torch.from_numpy(data.gather("images", indices))


@torch.inference_mode()
def latents(run: LoadedRun, data: DataSet, indices: np.ndarray, seed: int) -> Tensor:
    """Clean latents (n, C, h, w) on the run's device, sampled from the posterior with one stream per image."""
    if data.has_moments:
        moments = torch.from_numpy(data.gather("moments", indices)).float().to(device_of(run))
    else:
        moments = run.autoencoder.encode(pixels(data, indices).to(device_of(run)))
    # A separate purpose: with the seed of the noise, an image and its noise would be correlated.
    streams = SampleStreams(fold(seed, "posterior"), indices, moments.device)
    return run.autoencoder.sample(moments, noise=streams.randn(run.autoencoder.channels, *moments.shape[2:]))


def noised(path: Interpolant, x: Tensor, streams: Iterable[int], t: float, seed: int) -> tuple[Tensor, Tensor]:
    """(x_t, times (n,)): latents noised to level t, each with the stream of its index, so that all levels have the same noise."""
    noise = SampleStreams(seed, streams, x.device).randn_like(x)
    times = torch.full((len(x),), t, device=x.device)
    return interpolate(path, x, noise, times)[0], times


def require_neighbours(neighbours: int, num_images: int) -> None:
    if num_images <= neighbours:
        raise UserError(
            f"{neighbours} neighbours need more than {neighbours} images, but there are {num_images}: choose a lower --neighbours."
        )


def check_run(run: LoadedRun, data: DataSet, depths: Sequence[int]) -> tuple[int, ...]:
    """The requested depths, or all taps. Refuses other depths, a run with streams, and data that the run cannot read."""
    require_latents_alone(run.model)
    depths = tuple(depths) or tuple(range(1, run.model.tapped_depth + 1))
    for depth in depths:
        run.model.checked(Tap(depth))
    if not data.has_moments:
        data.require_images()
    # Latents of other weights or another scale would run through the network without an error.
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


@torch.inference_mode()
def collect_hidden(
    model: Backbone,
    latents: Iterable[Tensor],
    *,
    depths: Sequence[int],
    t: float,
    path: Interpolant,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    network_time: Callable[[Tensor], Tensor] = lambda t: t,
) -> dict[int, Tensor]:
    """Run noised latents through the model with the null condition: depth -> (N, D), the mean over tokens, float32 on CPU.

    The order is that of `latents`. Each image has its own noise stream, so its noise depends neither on the batches nor
    on t.

    Args:
        model: a backbone, such as DiT.
        latents: batches (n, C, H, W) of clean latents, scaled as in training.
        depths: block numbers, counted from 1; hidden[k] is the residual stream after block k.
        t: noise level in [0, 1]; 0 is data.
        path: the interpolant that the model was trained with.
        seed: of the noise.
        streams: number of each image's noise stream; None: 0, 1, 2, ...
        network_time: the model's time input for t (n,), which differs for discrete timesteps (`Process.network_time`).

    Raises:
        UserError: no depth, t outside [0, 1], or no latents.
    """
    taps = tuple(depths)
    if not taps or not 0.0 <= t <= 1.0:
        raise UserError(
            f"Hidden states need at least one depth and a t in [0, 1], but got depths {list(taps)} and t={t}."
        )
    parameter = next(model.parameters())
    pooled: dict[int, list[Tensor]] = {depth: [] for depth in taps}
    seen = 0
    for batch in latents:
        x = batch.to(parameter.device)
        # By index, not by position in the batch: another batch size or a subset of the images has the same noise.
        numbers = range(seen, seen + len(x)) if streams is None else streams[seen : seen + len(x)]
        x_t, times = noised(path, x, numbers, t, seed)
        hidden = hidden_states(model, x_t, network_time(times), taps)
        for depth in taps:
            pooled[depth].append(hidden[depth].float().mean(1).cpu())  # (n, D)
        seen += len(x)
    if seen == 0:
        raise UserError("There are no latents: pass at least one batch.")
    return {depth: torch.cat(rows) for depth, rows in pooled.items()}


def require_latents_alone(model: Backbone) -> None:
    """Raise UserError for a network that noises the vectors of streams (REG)."""
    if set(model.state_shapes) != {"x"}:
        names = ", ".join(name for name in model.state_shapes if name != "x")
        raise UserError(
            f"This network also noises {names}, but an analysis has only latents: choose a run without streams."
        )


def hidden_states(model: Backbone, x_t: Tensor, t: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream after blocks of the network, with the null condition: depth -> (n, T, D), only tokens of the grid.

    The true class would leak into the results of a probe. Raises UserError for a network with streams (REG), because their
    vectors are not known here.
    """
    require_latents_alone(model)
    output = model({"x": x_t}, t, null_condition(model, x_t), tuple(Tap(depth) for depth in depths))
    return {tap.depth: tokens[:, model.prefix_tokens :] for tap, tokens in output.taps.items()}


def null_condition(model: Backbone, x_t: Tensor) -> Condition:
    """The null condition for each of x_t."""
    return model.null(Condition(torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)))
