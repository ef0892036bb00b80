"""Parameters and FLOPs of a network, counted by torch while it runs without weights, on the meta device."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from repa.models.config import ModelConfig
from repa.models.contract import Backbone, Condition, State, Times, TwoTimes
from repa.models.dit import build
from repa.models.routing import placeholder


class Cost(NamedTuple):
    """Of one image. A multiplication and an addition are two FLOPs; only products of matrices and convolutions count."""

    parameters: int
    forward: int
    """FLOPs of one forward."""
    training: int
    """FLOPs of one forward and its backward; of a frozen network, its forward."""


def cost_of(network: nn.Module, run: Callable[[], Tensor]) -> Cost:
    """Count `run`, which calls the network on one image; nothing is computed when network and image are on the meta device."""
    parameters = sum(p.numel() for p in network.parameters())
    # A frozen encoder has no backward pass, and counting one would also fail: nothing requires a gradient.
    trained = any(p.requires_grad for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        output = run()
        forward = counter.get_total_flops()
        if trained:
            # The counter goes on from the forward pass, so its total is that of both.
            output.sum().backward()
    return Cost(parameters, forward, counter.get_total_flops())


def example_inputs(model: Backbone, num: int, *, token_times: bool = False) -> tuple[State, Times, Condition]:
    """State, time and condition of `num` samples, for a pass whose numbers do not matter."""
    state = {name: torch.zeros(num, *shape) for name, shape in model.state_shapes.items()}
    tokens = torch.zeros(num, model.grid[0] * model.grid[1], dtype=torch.bool)
    t = TwoTimes(torch.zeros(num, 2), tokens) if token_times else torch.zeros(num)
    return state, t, model.completed(Condition(torch.zeros(num, dtype=torch.int64)))


def model_cost(
    config: ModelConfig, *, token_times: bool = False, kept: Literal["some", "all", "none"] = "some"
) -> Cost:
    """Of one image; latent size and channels must be filled in.

    Args:
        token_times: tokens of an image have one of two times.
        kept: which tokens the blocks of a route see: some in training, all in samplers and averaged networks, none where the
            guidance path_drop asks for a prediction without these blocks.
    """
    # On the meta device shapes are computed and numbers are not: XL takes no memory and no time.
    with torch.device("meta"):
        model = build(config)
        state, t, condition = example_inputs(model, 1, token_times=token_times)
        keep = placeholder(model.route, 1, model.grid) if kept == "some" else None
        if kept == "none" and model.route:
            keep = torch.empty(1, 0, dtype=torch.int64)

    def run() -> Tensor:
        output = model(state, t, condition, keep=keep)
        return sum(part.sum() for part in (*output.prediction.values(), *output.heads.values()))

    return cost_of(model, run)
