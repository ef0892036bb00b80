"""Averages of the network's weights over the steps: float32 copies that follow it, one foreach call over all tensors."""

import copy
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from repa.runs.averaging import gamma_of, weights_name
from repa.training.config import TrainConfig

Share = Callable[[int], float]  # of the network in its average at step t = 1, 2, ...


def constant(decay: float) -> Share:
    """An exponential moving average: 1 - decay at every step."""
    return lambda t: 1.0 - decay


def power(width: float) -> Share:
    """1 - beta(t) with beta(t) = (1 - 1/t)^(gamma + 1): the profile t^gamma of relative width `width` (EDM2, arXiv 2312.02696)."""
    exponent = gamma_of(width) + 1.0
    return lambda t: 1.0 - (1.0 - 1.0 / t) ** exponent


class EMA:
    """A frozen copy of `model` that follows it: ema <- ema + share(t) * (model - ema)."""

    def __init__(self, model: nn.Module, share: Share):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.share = share
        self._followed = model

    @cached_property
    def _pairs(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(averages, what they follow), looked up at the first update: sharding replaces parameters before it."""
        own = dict(self.model.named_parameters())
        trained = [(own[name], p) for name, p in self._followed.named_parameters() if p.requires_grad]
        return [mine for mine, _ in trained], [p for _, p in trained]

    @torch.no_grad()
    def update(self, t: int, skip: Tensor) -> None:
        """Follow the weights after step t. Nothing changes, bit for bit, where `skip` (a float on the device) is 1."""
        averages, followed = ([local(p) for p in side] for side in self._pairs)
        share = self.share(t) * (1.0 - skip)  # a tensor, so that nothing waits for `skip`; CUDA then runs a kernel each
        torch._foreach_lerp_(averages, followed, [share] * len(averages))


def build_averages(model: nn.Module, config: TrainConfig) -> dict[str, EMA]:
    """The averages that a configuration asks for beside the first, by the names of their files."""
    shares = {f"ema-{decay:g}": constant(decay) for decay in config.ema_decays}
    shares |= {weights_name(width): power(width) for width in config.ema_widths}
    return {name: EMA(model, share) for name, share in shares.items()}


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
