"""How near a run comes to what its device could do: matrix products of the step against the rate at which it multiplies."""

import functools
import math

import torch

from repa.models.routing import tokens_at
from repa.training.measure import PRODUCT_SIDE, product_rate
from repa.training.objective import Objective

ONCE = ("adaLN_modulation", "t_embedder")  # matrices that an image passes once; all others see each of its tokens
FORWARD_AND_BACKWARD = 3  # a product has two gradients, each as large as itself


def flops_of(objective: Objective) -> float:
    """FLOPs of the matrix products of network and projectors for one image, forward and backward, from their shapes.

    A multiply and an add are two. `measure.flops_per_image` counts them in seconds; this takes no time at the start of a run.
    """
    model, products = objective.model, 0
    for name, p in objective.named_parameters():
        if p.ndim > 1 and "y_embedder" not in name:
            once = any(part in name for part in ONCE)
            products += 2 * p.numel() * (1 if once else tokens_at(model.route, _depth_of(name, objective), model.grid))
    seen = [tokens_at(model.route, depth, model.grid) for depth in range(1, model.depth + 1)]
    attention = sum(2 * (2 * tokens**2 * model.hidden_dim) for tokens in seen)  # queries with keys, weights with values
    return float(FORWARD_AND_BACKWARD * (products + attention))


def _depth_of(name: str, objective: Objective) -> int:
    """The block that a parameter belongs to, or whose tap its projector sees; 0: none, so that it sees all tokens."""
    room, *path = name.split(".")
    if room == "alignments":
        return objective.alignments[path[0]].tap.depth
    return int(path[1]) + 1 if path[0] == "blocks" else 0


def ideal_seconds(objective: Objective, precision: str, device: torch.device) -> float:
    """Seconds in which this device would do the products of one image, if it did nothing else.

    Not a number for fp16 on a CPU, which has no rate to speak of: it is emulated, faster in one kind of product than in another.
    """
    if precision == "fp16" and device.type == "cpu":
        return math.nan
    return flops_of(objective) / quick_rate(precision, device)


@functools.cache
def quick_rate(precision: str, device: torch.device) -> float:
    """`product_rate` in a fraction of a second, from matrices of half the side."""
    return product_rate(precision, device, side=PRODUCT_SIDE[device.type] // 2, repeats=4)
