"""Time the adaLN projections of one forward and backward in three layouts, under autocast to bf16.

    python benchmarks/adaln.py --model SiT-B/2 --batch 8

The layouts: one product per block (what the network does), weights concatenated in every forward, and weights stored as
one matrix.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from repa.base.device import autocast, timed
from repa.base.launch import keep_freed_memory
from repa.models.config import dimensions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    keep_freed_memory()
    device, size = torch.device(args.device), dimensions(args.model)
    width, rows = size.hidden_dim, 6 * size.hidden_dim
    c = torch.randn(args.batch, width, device=device, requires_grad=True)
    weights = [torch.randn(rows, width, device=device, requires_grad=True) for _ in range(size.depth)]
    stored = torch.randn(size.depth * rows, width, device=device, requires_grad=True)
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "each by itself": lambda: [F.linear(c, weight) for weight in weights],
        "concatenated": lambda: list(F.linear(c, torch.cat(weights)).chunk(size.depth, dim=1)),
        "stored as one": lambda: list(F.linear(c, stored).chunk(size.depth, dim=1)),
    }

    def once(way: Callable[[], list[Tensor]]) -> None:
        with autocast(device, "bf16"):
            out = way()
        torch.autograd.backward(out, [torch.ones_like(x) for x in out])
        for leaf in (c, stored, *weights):
            leaf.grad = None

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds + 1):  # the layouts take turns; the first round warms up
        for name, way in ways.items():
            seconds[name].append(timed(functools.partial(once, way), device))
    print(f"{args.model}, batch {args.batch}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, taken in seconds.items():
        print(f"{name:<16}{1000 * statistics.median(taken[1:]):9.2f} ms")


if __name__ == "__main__":
    main()
