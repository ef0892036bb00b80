"""Norm and modulation with a backward pass that reads each number once: a Triton kernel on CUDA, and plain PyTorch.

Autograd's backward pass reads gradient and normalised tokens for each of three sums, and stores the normalised tokens of
every norm. Here they are recomputed from the tokens and the stored mean and deviation. The setting `fused_norm` selects it;
off by default, because it has not been timed on a GPU yet.

N batch, T tokens, D width.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

ROWS = 16  # tokens per program, which sums their part of the gradients of shift and scale


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: x (N, T, D), shift and scale (N, 1, D)."""
    return _ModulatedNorm.apply(x, shift, scale, eps)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)  # (N, T, D), (N, T, 1) twice
        ctx.save_for_backward(x, mean, rstd, scale)
        return torch.addcmul(shift, normed, 1 + scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *modulated_norm_backward(gradient.contiguous(), *ctx.saved_tensors), None


# A custom operator, so that torch.compile does not trace into the Triton launch.
@torch.library.custom_op("repa::modulated_norm_backward", mutates_args=())
def modulated_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, shift, scale) from the gradient of the output, in plain PyTorch.

    With z = LayerNorm(x) and d = gradient * (1 + scale) they are rstd * (d - mean_D(d) - z * mean_D(d z)), sum_T(gradient) and
    sum_T(gradient z).
    """
    # Recomputed from x, because storing it in the forward pass would need too much memory for the time saved.
    normed = (x - mean) * rstd
    d = gradient * (1 + scale)
    of_x = rstd * (d - d.mean(-1, keepdim=True) - normed * (d * normed).mean(-1, keepdim=True))
    return of_x, gradient.sum(1, keepdim=True), (gradient * normed).sum(1, keepdim=True)


@modulated_norm_backward.register_fake
def _(gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)


@modulated_norm_backward.register_kernel("cuda")
def norm_backward_by_triton(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the kernel: each program processes ROWS tokens of an image; the partial sums over tokens are added at the end."""
    num, tokens, width = x.shape
    x, mean, rstd, scale = (t.contiguous() for t in (x, mean, rstd, scale))
    # One program per image would leave most of the GPU idle; one per token would write as many partial sums as
    # tokens.
    parts = -(-tokens // ROWS)
    of_x = torch.empty_like(x)
    of_shift, of_scale = (torch.empty(num, parts, width, device=x.device, dtype=torch.float32) for _ in range(2))
    # Triton needs ranges of a power of two; the mask excludes the surplus columns.
    padded = 1 << (width - 1).bit_length()
    norm_kernel()[(num, parts)](
        gradient, x, mean, rstd, scale, of_x, of_shift, of_scale, tokens, width, ROWS=ROWS, PADDED=padded
    )
    return of_x, of_shift.sum(1, keepdim=True).to(scale), of_scale.sum(1, keepdim=True).to(scale)


@functools.cache
def norm_kernel() -> "JITFunction":
    """The Triton kernel, defined on first use, because PyTorch for CPUs has no Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def backward(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
        gradient, x, mean, rstd, scale, of_x, of_shift, of_scale, tokens, width, ROWS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        # int64 for products with an image's index: offsets in large batches exceed int32.
        image, part = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, PADDED)
        inside = column < width
        gain = 1 + tl.load(scale + image * width + column, mask=inside, other=0).to(tl.float32)
        shift_sum = tl.zeros([PADDED], dtype=tl.float32)
        scale_sum = tl.zeros([PADDED], dtype=tl.float32)
        for i in range(ROWS):
            token = part * ROWS + i
            # The last program of an image may exceed its last token: those tokens are masked.
            live = column < tl.where(token < tokens, width, 0)
            row = image.to(tl.int64) * tokens + token
            g = tl.load(gradient + row * width + column, mask=live, other=0).to(tl.float32)
            # One number per token, loaded in every lane, so that the same mask applies.
            m = tl.load(mean + row + 0 * column, mask=live, other=0).to(tl.float32)
            r = tl.load(rstd + row + 0 * column, mask=live, other=0).to(tl.float32)
            z = tl.load(x + row * width + column, mask=live, other=0).to(tl.float32)
            z = tl.where(live, (z - m) * r, 0.0)
            d = g * gain
            both = r * (d - tl.sum(d, 0) / width - z * (tl.sum(d * z, 0) / width))
            tl.store(of_x + row * width + column, both, mask=live)
            shift_sum += g
            scale_sum += g * z
        place = (image.to(tl.int64) * tl.num_programs(1) + part) * width + column
        tl.store(of_shift + place, shift_sum, mask=inside)
        tl.store(of_scale + place, scale_sum, mask=inside)

    return backward
