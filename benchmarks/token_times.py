"""Measure the cost of two times per image (`diffusion.token_times`): two modulations per image, or one for every token.

python benchmarks/token_times.py --model SiT-XL/2                    FLOPs only, so any size will do
python benchmarks/token_times.py --model SiT-S/2 --batch-size 8      also seconds of forward and backward
"""

import argparse
import statistics
import time

import torch

from repa.models import Condition, TwoTimes, build_model
from repa.models.cost import cost_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch-size", type=int, default=0, help="images per timed step; 0: count FLOPs only")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    with torch.device("meta"):
        flops = {name: counted(given.model, name) for name in KINDS}
    print(f"{given.model}, 256 tokens{' ' * 22}GFLOP/image    times one time")
    for name, number in flops.items():
        print(f"  {name:<38} {number / 1e9:10.1f} {number / flops['one time']:14.3f}")
    if not given.batch_size:
        return
    seconds = {name: timed(given, name) for name in KINDS}
    print(f"forward and backward of {given.batch_size} images on {given.device}, median of {given.repeats} steps")
    for name, taken in seconds.items():
        print(f"  {name:<38} {taken:10.3f} s {taken / seconds['one time']:12.3f}")


KINDS = {
    "one time": lambda two: two.values[:, 0],
    "two times, a choice for each token": lambda two: two,
    "a time for each token": lambda two: two.of_tokens(),
}


def inputs(name: str, num: int) -> tuple:
    two = TwoTimes(torch.rand(num, 2), torch.rand(num, 256) < 0.75)
    return {"x": torch.randn(num, 4, 32, 32)}, KINDS[name](two), Condition(torch.zeros(num, dtype=torch.int64))


def counted(model_name: str, name: str) -> int:
    model = build_model(model_name, latent_size=32, num_classes=1000)
    return cost_of(model, lambda: model(*inputs(name, 1)).prediction["x"]).training


def timed(given: argparse.Namespace, name: str) -> float:
    torch.manual_seed(0)
    with torch.device(given.device):
        model = build_model(given.model, latent_size=32, num_classes=1000)
        arguments = inputs(name, given.batch_size)
    found = []
    for _ in range(given.repeats + 1):  # the first step warms up
        begin = time.perf_counter()
        model(*arguments).prediction["x"].sum().backward()
        if given.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
