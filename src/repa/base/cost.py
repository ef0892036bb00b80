"""What a network costs, counted by torch while the network runs without weights: on the meta device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


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
    trained = any(p.requires_grad for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(trained):
        output = run()
        forward = counter.get_total_flops()
        if trained:
            output.sum().backward()
    return Cost(parameters, forward, counter.get_total_flops())
