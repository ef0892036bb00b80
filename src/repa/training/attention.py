"""Choice of PyTorch's fastest fused attention kernel for a run's shape; it depends on release and device."""

import contextlib
import functools
import statistics
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from repa.base.device import timed
from repa.base.precision import DTYPES
from repa.models.layers import by_head
from repa.training.config import TrainConfig

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ROUNDS = 5


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
    found = {}
    for name, backend in KERNELS.items():
        # A kernel that does not support this shape or type raises an error, and is left out.
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            once = functools.partial(_forward_and_backward, qkv, heads)
            # The first call loads and builds the kernel, so it is not timed.
            seconds = [timed(once, device) for _ in range(ROUNDS + 1)][1:]
            found[name] = statistics.median(seconds)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _forward_and_backward(qkv: torch.Tensor, heads: int) -> None:
    out = F.scaled_dot_product_attention(*by_head(qkv, heads))
    torch.autograd.grad(out, qkv, torch.ones_like(out))


@contextlib.contextmanager
def fastest_kernels(config: TrainConfig, world: int, device: torch.device) -> Iterator[Mapping[str, float]]:
    """Within the block, attention prefers kernels in the order of `kernel_seconds`; has an effect only on CUDA."""
    if device.type != "cuda":
        yield {}
        return
    found = kernel_seconds(attention_shape(config, world), DTYPES[config.precision], device)
    # The other kernels follow, for calls with a mask or another width that the first does not support.
    rest = [name for name in KERNELS if name not in found]
    with sdpa_kernel([KERNELS[name] for name in (*found, *rest)], set_priority=True):
        yield found
