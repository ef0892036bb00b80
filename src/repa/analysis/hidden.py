"""What a run's network makes of prepared data: its images as clean latents, noised, and the hidden states of its blocks."""

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
    """`num` rows evenly over the data, which lies class by class; all when num is 0 or more than there are. No mirrored copies."""
    # In order and not drawn: neighbouring rows are of one class, so even spacing takes of each class its share.
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
    """Clean latents (n, C, h, w) on the run's device, drawn from the posterior by a stream per image."""
    if data.has_moments:
        moments = torch.from_numpy(data.gather("moments", indices)).float().to(device_of(run))
    else:
        moments = run.autoencoder.encode(pixels(data, indices).to(device_of(run)))
    # A separate purpose: with the noise's seed an image and its noise would be correlated.
    streams = SampleStreams(fold(seed, "posterior"), indices, moments.device)
    return run.autoencoder.sample(moments, noise=streams.randn(run.autoencoder.channels, *moments.shape[2:]))


def noised(path: Interpolant, x: Tensor, streams: Iterable[int], t: float, seed: int) -> tuple[Tensor, Tensor]:
    """(x_t, the time of each (n,)): latents noised to level t, each by the stream of its number, so alike at every level."""
    noise = SampleStreams(seed, streams, x.device).randn_like(x)
    times = torch.full((len(x),), t, device=x.device)
    return interpolate(path, x, noise, times)[0], times


def require_neighbours(neighbours: int, num_images: int) -> None:
    if num_images <= neighbours:
        raise UserError(
            f"{neighbours} neighbours need more images than that, but there are {num_images}: give a lower --neighbours."
        )


def check_run(run: LoadedRun, data: DataSet, depths: Sequence[int]) -> tuple[int, ...]:
    """The depths asked for, or all that can be tapped. Refuses others, a run with streams, and data that the run cannot read."""
    require_latents_alone(run.model)
    depths = tuple(depths) or tuple(range(1, run.model.tapped_depth + 1))
    for depth in depths:
        run.model.checked(Tap(depth))
    if not data.has_moments:
        data.require_images()
    # Latents of other weights or of another scale would pass through the network, and mean nothing to it.
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
    """Run noised latents through the model with no class given: depth -> (N, D), the mean over tokens, float32 on CPU.

    Rows are in the order of `latents`. Each is noised by its own stream, so it depends neither on the batches nor
    on t: the same noise is seen at every noise level.

    Args:
        model: a backbone, such as DiT.
        latents: batches (n, C, H, W) of clean latents, scaled as in training.
        depths: 1-based; hidden[k] is the residual stream after block k.
        t: noise level in [0, 1]; 0 is data.
        path: the interpolant that the model was trained with.
        seed: of the noise.
        streams: number of each row's stream of noise; 0, 1, 2, ... when None.
        network_time: what the model is given for t (n,); a network of timesteps has its own (`Process.network_time`).

    Raises:
        UserError: no depth, a t outside [0, 1], or no latents.
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
        # By number and not by place in the batch: another batch size, or a part of the rows alone, gives the same noise.
        numbers = range(seen, seen + len(x)) if streams is None else streams[seen : seen + len(x)]
        x_t, times = noised(path, x, numbers, t, seed)
        hidden = hidden_states(model, x_t, network_time(times), taps)
        for depth in taps:
            pooled[depth].append(hidden[depth].float().mean(1).cpu())  # (n, D)
        seen += len(x)
    if seen == 0:
        raise UserError("There are no latents to collect hidden states from.")
    return {depth: torch.cat(rows) for depth, rows in pooled.items()}


def require_latents_alone(model: Backbone) -> None:
    """Raise UserError for a network that noises the vectors of streams (REG)."""
    if set(model.state_shapes) != {"x"}:
        names = ", ".join(name for name in model.state_shapes if name != "x")
        raise UserError(
            f"This network also noises {names}, and an analysis gives it latents alone: choose another run."
        )


def hidden_states(model: Backbone, x_t: Tensor, t: Tensor, depths: Sequence[int]) -> dict[int, Tensor]:
    """The residual stream after blocks of the network, with no class given: depth -> (n, T, D), tokens of the grid alone.

    The true class would leak into what a probe finds. Raises UserError for a network with streams (REG), whose vectors
    are not known here.
    """
    require_latents_alone(model)
    output = model({"x": x_t}, t, null_condition(model, x_t), tuple(Tap(depth) for depth in depths))
    return {tap.depth: tokens[:, model.prefix_tokens :] for tap, tokens in output.taps.items()}


def null_condition(model: Backbone, x_t: Tensor) -> Condition:
    """What the network is told when no class is given, for each of x_t."""
    return model.null(Condition(torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)))
