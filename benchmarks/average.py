"""Measure the rounding error of averaged weights: float32 as in research code and as in repa, against float64.

    python benchmarks/average.py

Weights the size of a typical layer take small random steps. All averages start from the same weights and follow with
decay 0.9999. Prints the largest and the mean error, relative to the root mean square of the weights.
"""

import argparse
from typing import Any, cast

import torch
from torch import nn

from repa.training.update import EMA, exponential

DECAY = 0.9999


class Weights(nn.Module):
    def __init__(self, num: int, stream: torch.Generator):
        super().__init__()
        self.w = nn.Parameter(0.02 * torch.randn(num, generator=stream))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--num", type=int, default=4096, help="number of weights")
    parser.add_argument("--step-size", type=float, default=1e-5, help="standard deviation of one step of the weights")
    args = parser.parse_args()
    stream = torch.Generator().manual_seed(0)
    model = Weights(args.num, stream)
    ours = EMA(cast(Any, model), exponential(DECAY))
    released, exact = model.w.detach().clone(), model.w.detach().double()
    never = torch.zeros(())
    for t in range(1, args.steps + 1):
        model.w.add_(args.step_size * torch.randn(args.num, generator=stream))
        ours.update(t, never)
        released.mul_(DECAY).add_(model.w, alpha=1 - DECAY)
        exact.lerp_(model.w.double(), 1 - DECAY)
    size = float(exact.square().mean().sqrt())
    print(f"{args.steps:,} steps, decay {DECAY}, {args.num:,} weights in float32, torch {torch.__version__}")
    for name, average in (("mul_().add_()", released), ("repa", ours.model.get_parameter("w"))):
        error = (average.double() - exact).abs()
        print(
            f"{name:<14} largest error {float(error.max()) / size:.1e}, mean {float(error.mean()) / size:.1e} of the weights' size"
        )


if __name__ == "__main__":
    main()
