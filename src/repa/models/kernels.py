"""Norm and modulation whose backward reads each number once: a Triton kernel on CUDA, and its twin in plain PyTorch.

Autograd's own backward reads gradient and normalised tokens again for each of three sums, and keeps the normalised tokens of
every norm until then. Here they are computed again from the tokens, of which only mean and deviation are kept. Chosen by
`fused_norm`; off by default, as nobody has timed it on a GPU yet.

N batch, T tokens, D width.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

ROWS = 16  # tokens of one program, which adds up their part of the gradients of shift and scale


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


# A custom operator and no plain function: torch.compile takes it as one piece instead of looking into a Triton launch.
@torch.library.custom_op("repa::modulated_norm_backward", mutates_args=())
def modulated_norm_backward(
    gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, shift, scale) from that of the output. The twin in plain PyTorch.

    With z = LayerNorm(x) and d = gradient * (1 + scale) they are rstd * (d - mean_D(d) - z * mean_D(d z)), sum_T(gradient) and
    sum_T(gradient z).
    """
    # Computed again from x: keeping it from the forward pass costs more memory than this costs time.
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
    """The same by the kernel: each program takes ROWS tokens of an image; the sums over tokens are added up at the end."""
    num, tokens, width = x.shape
    x, mean, rstd, scale = (t.contiguous() for t in (x, mean, rstd, scale))
    # One program an image would leave most of the GPU idle; one a token would write as many partial sums as
    # tokens.
    parts = -(-tokens // ROWS)
    of_x = torch.empty_like(x)
    of_shift, of_scale = (torch.empty(num, parts, width, device=x.device, dtype=torch.float32) for _ in range(2))
    # Triton needs ranges of a power of two; the mask leaves the surplus columns out.
    padded = 1 << (width - 1).bit_length()
    norm_kernel()[(num, parts)](
        gradient, x, mean, rstd, scale, of_x, of_shift, of_scale, tokens, width, ROWS=ROWS, PADDED=padded
    )
    return of_x, of_shift.sum(1, keepdim=True).to(scale), of_scale.sum(1, keepdim=True).to(scale)


@functools.cache
def norm_kernel() -> "JITFunction":
    """The Triton kernel, made when it is first needed: PyTorch for a CPU comes without Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def backward(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
        gradient, x, mean, rstd, scale, of_x, of_shift, of_scale, tokens, width, ROWS: tl.constexpr, PADDED: tl.constexpr
    ):  # fmt: skip
        # int64 where the number of an image is multiplied: offsets in large batches pass the range of int32.
        image, part = tl.program_id(0), tl.program_id(1)
        column = tl.arange(0, PADDED)
        inside = column < width
        gain = 1 + tl.load(scale + image * width + column, mask=inside, other=0).to(tl.float32)
        shift_sum = tl.zeros([PADDED], dtype=tl.float32)
        scale_sum = tl.zeros([PADDED], dtype=tl.float32)
        for i in range(ROWS):
            token = part * ROWS + i
            # The last program of an image may reach beyond its last token: those rows are masked whole.
            live = column < tl.where(token < tokens, width, 0)
            row = image.to(tl.int64) * tokens + token
            g = tl.load(gradient + row * width + column, mask=live, other=0).to(tl.float32)
            # One number for the row, loaded in every lane: so the same mask holds for it.
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
