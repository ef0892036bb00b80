"""SiT's and diffusers' conventions folded into the weights, so that the same network reads another time and sign.

The first layer of the timestep embedding is linear in [cos f t, sin f t]: what is linear in these features goes into
its weight (D, 2F).
"""

import math

import torch
from torch import Tensor

from repa.models.layers import timestep_frequencies

StateDict = dict[str, Tensor]
FIRST_TIME_LAYER = "t_embedder.mlp.0.weight"
STENCIL = 8  # neighbouring frequencies that stand for one between them: off by less than 1e-7 for t in [0, 1]


def from_sit(state: StateDict) -> StateDict:
    """v(x, t) = -v_SiT(x, 1 - t), by weights alone (SiT: t = 1 is data and velocity = data - noise)."""
    state = dict(state)
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        # SiT answers the variance in the last channels of each patch and never uses it: only the first half
        # of the rows is the velocity. The sign turns because its velocity points from noise to data.
        rows = state[name].unflatten(0, (patch_size**2, -1))[:, :channels]
        state[name] = -rows.flatten(0, 1)
    state[FIRST_TIME_LAYER] = reverse_time(state[FIRST_TIME_LAYER])
    return state


def to_sit(state: StateDict) -> StateDict:
    """The inverse of from_sit (reversing time twice is the identity), with variance channels that are zero."""
    state = dict(state)
    channels, patch_size = state["x_embedder.proj.weight"].shape[1:3]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = -state[name].unflatten(0, (patch_size**2, channels))
        state[name] = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten(0, 1)
    state[FIRST_TIME_LAYER] = reverse_time(state[FIRST_TIME_LAYER])
    return state


def reverse_time(weight: Tensor) -> Tensor:
    """The W' with W' [cos ft, sin ft] = W [cos f(1-t), sin f(1-t)], by the addition theorems in float64."""
    # In float64: rounded sines would otherwise end up in the weights.
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    f = timestep_frequencies(weight.shape[1]).double()
    reversed_ = torch.cat([on_cos * f.cos() + on_sin * f.sin(), on_cos * f.sin() - on_sin * f.cos()], dim=1)
    return reversed_.to(weight.dtype)


def for_frequencies_of_diffusers(weight: Tensor) -> Tensor:
    """The W' that gives on the frequencies of diffusers' DiT what W gives on ours, for t in [0, 1] and no other t.

    Ours (and DiT's) are 10000^(-k/F), those of diffusers 10000^(-k/(F-1)), k = 0 ... F-1. While f t <= 1,
    cos(f t) and sin(f t) are so smooth in log f that interpolation between neighbouring frequencies is exact to float32.
    """
    num = weight.shape[1] // 2
    return _on_other_frequencies(weight, [k * (num - 1) / num for k in range(num)])


def from_frequencies_of_diffusers(weight: Tensor) -> Tensor:
    """The way back, as exact: the W that gives on our frequencies what W' gives on those of diffusers, for t in [0, 1]."""
    num = weight.shape[1] // 2
    return _on_other_frequencies(weight, [k * num / max(num - 1, 1) for k in range(num)])


def _on_other_frequencies(weight: Tensor, places: list[float]) -> Tensor:
    """W for features at the whole numbers 0, 1, ... in place of `places`, both counted along the logarithm of the frequency."""
    num = len(places)
    weights = torch.zeros(num, num, dtype=torch.float64)  # row: a frequency of W, column: one of the result
    size = min(STENCIL, num)
    for k, place in enumerate(places):
        # Near the ends of the table the stencil is shifted inward, because there are no frequencies beyond it.
        first = min(max(math.floor(place) - size // 2 + 1, 0), num - size)
        nodes = range(first, first + size)
        for node in nodes:  # Lagrange
            weights[k, node] = math.prod((place - other) / (node - other) for other in nodes if other != node)
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    return torch.cat([on_cos @ weights, on_sin @ weights], dim=1).to(weight.dtype)
