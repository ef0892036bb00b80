"""Parameters and FLOPs of a network, counted by torch on the meta device, without weights."""

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
    """Cost per image. A multiply-add is two FLOPs; only matrix products and convolutions are counted."""

    parameters: int
    forward: int
    """FLOPs of a forward pass."""
    training: int
    """FLOPs of a forward and backward pass; for a frozen network, of the forward pass."""


def cost_of(network: nn.Module, run: Callable[[], Tensor]) -> Cost:
    """Count the FLOPs of `run`, which calls the network on one image; on the meta device nothing is computed."""
    parameters = sum(p.numel() for p in network.parameters())
    # A frozen encoder has no backward pass, and counting one would fail because nothing requires a gradient.
    trained = any(p.requires_grad for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        output = run()
        forward = counter.get_total_flops()
        if trained:
            # The counter continues from the forward pass, so it counts both.
            output.sum().backward()
    return Cost(parameters, forward, counter.get_total_flops())


def example_inputs(model: Backbone, num: int, *, token_times: bool = False) -> tuple[State, Times, Condition]:
    """State, time and condition of `num` samples, for a pass in which values do not matter."""
    state = {name: torch.zeros(num, *shape) for name, shape in model.state_shapes.items()}
    tokens = torch.zeros(num, model.grid[0] * model.grid[1], dtype=torch.bool)
    t = TwoTimes(torch.zeros(num, 2), tokens) if token_times else torch.zeros(num)
    return state, t, model.completed(Condition(torch.zeros(num, dtype=torch.int64)))


def model_cost(
    config: ModelConfig, *, token_times: bool = False, kept: Literal["some", "all", "none"] = "some"
) -> Cost:
    """Cost per image; latent size and channels must be set.

    Args:
        token_times: whether tokens of an image have one of two times.
        kept: tokens in the routed blocks: some in training, all in samplers and averaged networks, none for the guidance
            path_drop.
    """
    # On the meta device only shapes are computed, so XL needs no memory and no time.
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
