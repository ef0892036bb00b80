"""Exponential moving average of the network's weights, float32, one fused update over all tensors."""

import copy

import torch
from torch import nn


class EMA:
    """A frozen copy of `model` that follows it: ema <- decay * ema + (1 - decay) * model."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        self._source = [p for name, p in model.named_parameters() if name in trained]
        self._target = [p for name, p in self.model.named_parameters() if name in trained]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(self._target, [p.detach() for p in self._source], 1.0 - self.decay)
