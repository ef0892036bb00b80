"""Hidden states of a diffusion transformer, pooled over tokens, at chosen depths and one noise level."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.base.rng import SampleStreams
from repa.diffusion import Interpolant, interpolate
from repa.models import Backbone, Condition, Tap


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

    Rows are in the order of `latents`. Each is noised by a stream of its own, so it depends neither on the batches nor
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
        numbers = range(seen, seen + len(x)) if streams is None else streams[seen : seen + len(x)]
        noise = SampleStreams(seed, numbers, x.device).randn_like(x)
        times = torch.full((len(x),), t, device=x.device)  # (n,)
        x_t, _ = interpolate(path, x, noise, times)
        hidden = hidden_states(model, x_t, network_time(times), taps)
        for depth in taps:
            pooled[depth].append(hidden[depth].float().mean(1).cpu())  # (n, D)
        seen += len(x)
    if seen == 0:
        raise UserError("There are no latents to collect hidden states from.")
    return {depth: torch.cat(rows) for depth, rows in pooled.items()}


def require_latents_alone(model: Backbone) -> None:
    """Raise UserError for a network that noises vectors beside the latents (REG)."""
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
    condition = model.null(Condition(torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)))
    output = model({"x": x_t}, t, condition, tuple(Tap(depth) for depth in depths))
    return {tap.depth: tokens[:, model.prefix_tokens :] for tap, tokens in output.taps.items()}
