"""Weight of an image's loss by its time: f(t (N,), **settings) -> (N,), t = 0 is data, 1 noise (REED, arXiv 2507.08980).

Each image's loss is multiplied by the weight of its own time. REED's released code multiplies the mean of the losses by the
mean of the weights, by a broadcast of (N, 1, 1, 1) with (N,).
"""

import math

import torch
from pydantic import PositiveFloat
from torch import Tensor


def constant(t: Tensor) -> Tensor:
    """1 at every time."""
    return torch.ones_like(t)


def linear(t: Tensor) -> Tensor:
    """1 - t: decreases with noise."""
    return 1 - t


def loglinear(t: Tensor) -> Tensor:
    """1 - log(1 + t): falls more slowly than linear, to 0.31."""
    return 1 - torch.log1p(t)


def cosine(t: Tensor) -> Tensor:
    """cos(pi t / 2)^2: from 1 to 0, flat at both ends."""
    return (0.5 * math.pi * t).cos().square()


def sigmoid(t: Tensor, *, slope: PositiveFloat = 10.0) -> Tensor:
    """1 / (1 + exp(slope (t - 0.5))): a smooth step down at t = 0.5."""
    return torch.sigmoid(slope * (0.5 - t))
