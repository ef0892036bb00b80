"""AdamW and the first average in one pass over the weights: a Triton kernel for all tensors together on CUDA.

The two calls that it replaces read the weights twice, and the average needs one kernel per tensor. Both give the same result.
Enabled by `fused_update`; off by default, because it has not been timed on a GPU yet.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

BLOCK = 4096  # numbers of one program


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
