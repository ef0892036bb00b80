"""Time forward and backward of the attention in `repa.models` against PyTorch's fused kernel.

python benchmarks/attention.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.models.layers import attend

SHAPES = ((64, 3, 64, 64), (16, 6, 256, 64), (8, 12, 256, 64))  # images, heads, tokens, head width
ROUNDS = 7


def seconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    begin = time.perf_counter()
    out = attention(*inputs)
    out.backward(torch.ones_like(out))
    for tensor in inputs:
        tensor.grad = None
    return time.perf_counter() - begin


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; median of {ROUNDS}, forward and backward, in ms"
    )
    print(f"{'images heads tokens width':<28}{'dtype':<16}{'ours':>8}{'fused':>8}{'fused/ours':>12}")
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            pairs = [
                (seconds(attend, inputs), seconds(F.scaled_dot_product_attention, inputs)) for _ in range(ROUNDS + 1)
            ][1:]
            ours, fused = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{shape!s:<28}{dtype!s:<16}{ours:8.1f}{fused:8.1f}{fused / ours:12.2f}")


if __name__ == "__main__":
    main()
