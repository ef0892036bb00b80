"""Time a training step on a CPU, eager and compiled, and compare it with the rate of its matrix products.

    python benchmarks/cpu.py --model SiT-B/2 --depth 3 --batch 8

Uses one thread and processor time, which other programs hardly affect. Each round times the steps and a square product
in turn; the medians are printed. A shallow network of full width says nearly as much as the whole one and takes less
time, but its update and projector weigh more. Then each matrix product of a block is compared with the square one.
Together they give the rate that the step would reach if it did nothing else.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

from repa.alignment.config import AlignmentConfig
from repa.base.device import DTYPES
from repa.base.launch import keep_freed_memory
from repa.models.config import ModelConfig
from repa.performance.batches import Synthetic, in_memory
from repa.performance.counts import flops_per_image, product_shapes
from repa.performance.measure import MeasuredStep
from repa.training import TrainConfig

SIDE = 2048  # side of the square product
ENCODER, WIDTH = "dinov2-b", 768


def seconds(run: Callable[[], object], repeats: int = 1) -> float:
    """Processor time, the best of several runs."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return min(found)


def step_of(config: TrainConfig) -> MeasuredStep:
    data = Synthetic({ENCODER: WIDTH}, config.model.latent_size // config.model.dims().patch_size)
    batch = data.batch(config, torch.device("cpu"), 1)
    return MeasuredStep(config, in_memory(data.widths, batch), torch.device("cpu"))


def products(config: TrainConfig, rate: float) -> None:
    shapes, spent, done, dtype = product_shapes(config), 0.0, 0, DTYPES[config.precision]
    for name, (m, k, n) in shapes.items():
        left, right = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
        if name.endswith("forward"):  # use autograd's memory layout
            right = right.t().contiguous().t()
        elif name.endswith("weight"):
            left = left.t().contiguous().t()
        took = seconds(functools.partial(torch.matmul, left, right), 5)
        spent, done = spent + took, done + 2 * m * k * n
        print(f"  {name:<14}({m} x {k}) @ ({k} x {n}): {2 * m * k * n / took / rate:.0%} of the square product's rate")
    print(f"  all products of a block together: {done / spent / rate:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-B/2")
    parser.add_argument("--depth", type=int, default=0, help="number of blocks; 0: the model's own depth")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    network = ModelConfig(name=args.model, latent_size=32, latent_channels=4, num_classes=1000, depth=args.depth)
    alignment = AlignmentConfig(target=ENCODER, depth=min(8, network.dims().depth - 1))
    config = TrainConfig(model=network, alignments=(alignment,), batch_size=args.batch, precision=args.precision)
    flops = args.batch * flops_per_image(config, {ENCODER: WIDTH})
    steps = {"eager": step_of(config), "compiled": step_of(config.override(compile=True))}
    for step in steps.values():
        step()
        step()
    a, rounds = torch.randn(SIDE, SIDE).to(DTYPES[args.precision]), []
    for _ in range(args.rounds):
        rate = 2 * SIDE**3 / seconds(lambda: a @ a, 4)
        rounds.append((rate, *(seconds(step) for step in steps.values())))
    rate, *times = (statistics.median(column) for column in zip(*rounds, strict=True))
    name = (
        f"{args.model}, {network.dims().depth} blocks, batch {args.batch}, {args.precision}, torch {torch.__version__}"
    )
    print(f"{name}; square product {rate / 1e12:.3g} TFLOP/s")
    for name, took in zip(steps, times, strict=True):
        print(f"  {name:<10}{took:.2f} s of processor time, {flops / took / rate:.0%} of the rate")
    products(config, rate)


if __name__ == "__main__":
    main()
