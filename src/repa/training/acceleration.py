"""Faster computation on CUDA: the choice of attention kernel, linear layers in 8 bits, AdamW and average in one pass.

The fastest of PyTorch's attention kernels depends on the run's shape, the release and the device.

8 bits: all three products of a linear layer, with one scale per tensor, recomputed in every step. Inputs and weights are
rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57,344), as arXiv 2209.05433 proposes;
products accumulate in float32 and come out in bfloat16. Weights stay float32, biases and their gradients are exact. The
backward pass keeps the rounded input and weight: half the bytes of bfloat16.

One pass: a Triton kernel for all tensors together. The two calls that it replaces read the weights twice, and the average
needs one kernel per tensor. Both give the same result. Enabled by `fused_update`; off by default, because it has not been
timed on a GPU yet.
"""

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from repa.base.device import DTYPES, timed
from repa.base.errors import UserError
from repa.models import Backbone
from repa.models.layers import by_head
from repa.training.config import TrainConfig

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROUNDS = 5  # timings of a kernel
FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # the kernels need both sides of a matrix to be multiples of this
CAPABILITY = (8, 9)  # the first CUDA devices with 8-bit products
BLOCK = 4096  # numbers of one program of the update


def attention_shape(config: TrainConfig, world: int) -> tuple[int, int, int, int]:
    """(N, heads, T, width of a head) of the network's attention in one micro-batch of one process."""
    dims = config.model.dims()
    tokens = (config.model.latent_size // dims.patch_size) ** 2 + len(config.streams)
    num = config.batch_size // (world * config.accumulate)
    return num, dims.num_heads, tokens, dims.hidden_dim // dims.num_heads


def kernel_seconds(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Kernel -> seconds of forward and backward (median of ROUNDS), fastest first; without kernels that refuse the
    shape.

    Queries, keys and values are views of one tensor, as in the network.
    """
    num, heads, tokens, width = shape
    qkv = torch.randn(num, tokens, 3 * heads * width, device=device, dtype=dtype, requires_grad=True)
    medians = {}
    for name, backend in KERNELS.items():
        # A kernel that does not support this shape or type raises an error, and is left out.
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            once = functools.partial(_forward_and_backward, qkv, heads)
            # The first call loads and builds the kernel, so it is not timed.
            seconds = [timed(once, device) for _ in range(ROUNDS + 1)][1:]
            medians[name] = statistics.median(seconds)
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def _forward_and_backward(qkv: torch.Tensor, heads: int) -> None:
    out = F.scaled_dot_product_attention(*by_head(qkv, heads))
    torch.autograd.grad(out, qkv, torch.ones_like(out))


@contextlib.contextmanager
def fastest_kernels(config: TrainConfig, world: int, device: torch.device) -> Iterator[Mapping[str, float]]:
    """Within the block, attention prefers kernels in the order of `kernel_seconds`; has an effect only on CUDA."""
    if device.type != "cuda":
        yield {}
        return
    seconds = kernel_seconds(attention_shape(config, world), DTYPES[config.precision], device)
    # The other kernels follow, for calls with a mask or another width that the first does not support.
    rest = [name for name in KERNELS if name not in seconds]
    with sdpa_kernel([KERNELS[name] for name in (*seconds, *rest)], set_priority=True):
        yield seconds


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
    names = []
    for number, block in list(enumerate(model.blocks))[1:-1]:
        for name, layer in block.named_modules():
            if type(layer) is not nn.Linear or id(layer.weight) not in hidden:
                continue
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                continue
            # The class changes in place: parameters, hooks and names in state dicts stay those of the plain layer.
            layer.__class__ = Float8Linear
            names.append(f"blocks.{number}.{name}")
    if not names:
        raise UserError(
            f"fp8 needs matrices with sides that are multiples of {MULTIPLE}, but this network has none between its first and last block: "
            "leave fp8 out."
        )
    return names


class ParameterRow(NamedTuple):
    """The tensors of one parameter, float32 and of equal shape except for the step."""

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    """Mean of gradients."""
    second: Tensor
    """Mean of their squares."""
    step: Tensor
    """() number of steps that changed it."""
    average: Tensor | None
    """None: no average."""


def update_by_triton(
    rows: Sequence[ParameterRow], skip: Tensor, grad_scale: Tensor, share: float, *, rate: float, betas: tuple[float, float],
    eps: float, decay: float,
) -> None:  # fmt: skip
    """One launch for all rows. Values on the device are used only there, without synchronisation."""
    # A skipped step does not count: the bias corrections below use the number of steps that changed a parameter.
    steps = [row.step for row in rows]
    torch._foreach_add_(steps, [1.0 - skip] * len(steps))
    beta1, beta2 = betas
    # In float64: in the first steps 1 - beta2^t is the difference of two numbers that float32 hardly tells apart.
    done = torch.stack(steps).double()
    of_each = torch.stack([rate / (1 - beta1**done), (1 - beta2**done).rsqrt()], 1).float()  # (rows, 2)
    keep = torch.full_like(skip, 1 - rate * decay)
    of_all = torch.stack([keep, 1 / grad_scale, 1 - skip, torch.full_like(skip, share)])
    tensors = [(row.parameter, row.gradient, row.first, row.second, row.average) for row in rows]
    # A launch does not accept a list of tensors, so their addresses are data: one launch then updates hundreds of parameters.
    addresses = torch.tensor([[0 if x is None else x.data_ptr() for x in row] for row in tensors])  # (rows, 5)
    if skip.device.type == "cuda":
        addresses = addresses.pin_memory().to(skip.device, non_blocking=True)
    sizes, owner, start = programs(tuple(row.parameter.numel() for row in rows), skip.device)
    update_kernel()[(len(owner),)](
        addresses, sizes, owner, start, of_each, of_all, 1 - beta1, 1 - beta2, beta2, eps, BLOCK=BLOCK
    )


# One entry: a run has one list of parameters, whose shapes never change.
@functools.lru_cache(maxsize=1)
def programs(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of each row; of each program the row that it works on, and where in it it begins."""
    of_rows = torch.tensor(sizes)
    each = -(-of_rows // BLOCK)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), each)
    start = (torch.arange(len(owner)) - (each.cumsum(0) - each)[owner]) * BLOCK
    return of_rows.to(device), owner.to(device), start.to(device)


@functools.cache
def update_kernel() -> "JITFunction":
    """The Triton kernel, built at its first use: PyTorch for a CPU has no Triton."""
    import triton
    import triton.language as tl

    @triton.jit
    def update(  # type: ignore[no-untyped-def]  # Triton reads annotations as its own types
        addresses, sizes, owner, start, of_each, of_all, new1, new2, beta2, eps, BLOCK: tl.constexpr
    ):  # fmt: skip
        program = tl.program_id(0)
        row = tl.load(owner + program)
        place = tl.load(start + program) + tl.arange(0, BLOCK)
        keep, scale, live, share = tl.load(of_all), tl.load(of_all + 1), tl.load(of_all + 2), tl.load(of_all + 3)
        size = tl.where(live > 0, tl.load(sizes + row), 0)  # a step that is skipped reads and writes nothing
        inside = place < size
        at = addresses + row * 5
        parameter = tl.load(at).to(tl.pointer_type(tl.float32)) + place
        gradient = tl.load(at + 1).to(tl.pointer_type(tl.float32)) + place
        first = tl.load(at + 2).to(tl.pointer_type(tl.float32)) + place
        second = tl.load(at + 3).to(tl.pointer_type(tl.float32)) + place
        followed = tl.load(at + 4)
        average = followed.to(tl.pointer_type(tl.float32)) + place
        g = tl.load(gradient, mask=inside, other=0) * scale
        m = tl.load(first, mask=inside, other=0)
        v = tl.load(second, mask=inside, other=0)
        p = tl.load(parameter, mask=inside, other=0)
        m += new1 * (g - m)
        v = beta2 * v + new2 * g * g
        p = p * keep - tl.load(of_each + row * 2) * m / (tl.sqrt(v) * tl.load(of_each + row * 2 + 1) + eps)
        tl.store(first, m, mask=inside)
        tl.store(second, v, mask=inside)
        tl.store(parameter, p, mask=inside)
        averaged = place < tl.where(followed != 0, size, 0)
        e = tl.load(average, mask=averaged, other=0)
        tl.store(average, e + share * (p - e), mask=averaged)

    return update
