"""LoRA (arXiv 2106.09685): a frozen linear layer with a low-rank update, W x + B A x, which can be merged into its weight.

The paper's factor alpha / rank is 1, so a state dict is enough to merge.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from repa.base.errors import UserError
from repa.models.contract import Backbone

DOWN, UP = "lora_A", "lora_B"
LABELS = "y_embedder"  # also trained, because the classes of a new data set have no vectors yet


class LoRALinear(nn.Linear):
    """A linear layer with an update: (..., K) -> (..., N). `use_lora` converts linear layers in place."""

    def add_update(self, rank: int) -> None:
        """Add a zero update: B is zero."""
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def use_lora(model: Backbone, rank: int) -> list[str]:
    """Freeze the network and add an update of this rank to each matrix of attention and MLP, in place; returns their names.

    Raises:
        UserError: a network without `matrices`, or too high a rank.
    """
    chosen = {id(parameter) for parameter in model.matrices()}
    layers = {
        name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear and id(layer.weight) in chosen
    }
    if not layers:
        raise UserError(
            f"LoRA needs linear layers in the network's matrices, but {type(model).__name__} has none: turn lora off."
        )
    smallest = min(min(layer.weight.shape) for layer in layers.values())
    if rank >= smallest:
        raise UserError(
            f"--lora.rank is {rank}, but the smallest matrix has {smallest} rows or columns: choose a smaller rank, such as 16."
        )
    model.requires_grad_(False)
    for layer in layers.values():
        # The class changes in place, so that the layer keeps its name in state dicts and all references see the update.
        layer.__class__ = LoRALinear
        assert isinstance(layer, LoRALinear)
        layer.add_update(rank)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{LABELS}."):
            parameter.requires_grad_(True)
    return list(layers)


def merged_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with W + B A instead of W, A and B; unchanged if it has no updates."""
    plain = {name: value for name, value in state.items() if not name.endswith((f".{DOWN}", f".{UP}"))}
    for name, down in state.items():
        layer = name.removesuffix(f".{DOWN}")
        if layer == name:
            continue
        up, weight = state.get(f"{layer}.{UP}"), plain.get(f"{layer}.weight")
        if up is None or weight is None or not fits(down, up, weight):
            raise UserError(f"The update of {layer} does not fit its weight: use weights of a LoRA that repa trained.")
        # In float64, so that merged and unmerged networks differ only by the last rounding.
        update = up.double() @ down.double()
        plain[f"{layer}.weight"] = (weight.double() + update).to(torch.promote_types(weight.dtype, down.dtype))
    return plain


def fits(down: Tensor, up: Tensor, weight: Tensor) -> bool:
    """Whether an update (r, K), (N, r) fits a weight (N, K)."""
    return down.ndim == up.ndim == 2 and up.shape[1] == len(down) and (len(up), down.shape[1]) == weight.shape
