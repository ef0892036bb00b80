"""Linear layers with all three products in 8 bits and one scale per tensor, recomputed in every step.

Inputs and weights are rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344), as
arXiv 2209.05433 proposes; products accumulate in float32 and come out in bfloat16. Weights stay float32, biases and their
gradients are exact. The backward pass keeps the rounded input and weight: half the bytes of bfloat16.
"""

from typing import Any

import torch
from torch import Tensor, nn

from repa.base.errors import UserError
from repa.models import Backbone

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the kernels need both sides of a matrix to be multiples of this
CAPABILITY = (8, 9)  # the first CUDA devices with 8-bit products


class Float8Linear(nn.Linear):
    """A linear layer in 8 bits: (..., K) -> (..., N) in bfloat16. `use_fp8` converts a plain one in place."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x (M, K) @ weight (N, K) transposed -> (M, N)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = rounded(x, FORWARD)
        w8, w_scale = rounded(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.dtypes = x.dtype, weight.dtype
        return multiplied(x8, w8.t(), x_scale, w_scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = rounded(gradient, GRADIENT)
        # The second factor must be laid out column by column, the first row by row.
        of_x = multiplied(g8, w8.t().contiguous().t(), g_scale, w_scale)  # (M, N) @ (N, K)
        of_weight = multiplied(g8.t().contiguous(), x8.t().contiguous().t(), g_scale, x_scale)  # (N, M) @ (M, K)
        return of_x.to(ctx.dtypes[0]), of_weight.to(ctx.dtypes[1])


def rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits and its float32 scale; the largest number maps to the largest 8-bit number."""
    # A tensor of zeros, as a gradient may be at the start, would divide by zero.
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def multiplied(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """a (M, K) row by row @ b (K, N) column by column, scaled back, in bfloat16."""
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=torch.bfloat16)


def use_fp8(model: Backbone, precision: str, device: torch.device) -> list[str]:
    """Convert the linear layers of all blocks but the first and the last to 8 bits in place; returns their names.

    Only hidden matrices are converted, as for Muon: attention and MLP, not adaLN. Parameters, their names and checkpoints
    do not change.

    Raises:
        UserError: the precision is not bf16, the device has no 8-bit products, or the network has no suitable layer.
    """
    if precision != "bf16":
        raise UserError(f"fp8 needs precision bf16, but precision is {precision}: choose bf16, or fp8 false.")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(f"{torch.cuda.get_device_name(device)} does not support 8-bit products: leave fp8 out.")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"fp8 runs on CUDA, and for trials on a CPU, but not on {device.type}: leave fp8 out.")
    hidden = {id(p) for p in model.matrices()}
    found = []
    for number, block in list(enumerate(model.blocks))[1:-1]:
        for name, layer in block.named_modules():
            if type(layer) is not nn.Linear or id(layer.weight) not in hidden:
                continue
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                continue
            # The class changes in place: parameters, hooks and names in state dicts stay those of the plain layer.
            layer.__class__ = Float8Linear
            found.append(f"blocks.{number}.{name}")
    if not found:
        raise UserError(
            f"fp8 needs matrices with sides that are multiples of {MULTIPLE}, but this network has none between its first and last block: "
            "leave fp8 out."
        )
    return found
