"""Compare time and memory of CKNNA with a plain implementation that holds the n x n kernels and masks.

    python benchmarks/cknna.py [--num 10000] [--width 768] [--plain-num 4000] [--out cknna.json]

Every measurement runs in a separate process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from repa.analysis import cknna

K = 10


def plain(a: Tensor, b: Tensor, k: int, variant: str) -> float:
    """The formulas on whole matrices in float64."""
    kernels, near = [], []
    for x in (a.double(), b.double()):
        if variant != "paper":
            bound = x.abs().flatten().sort().values[int(0.95 * x.numel())]
            x = torch.nn.functional.normalize(x.clamp(-bound, bound), dim=1)
        kernel = x @ x.T
        close = (kernel if variant != "paper" else -torch.cdist(x, x)).fill_diagonal_(-torch.inf)
        near.append(torch.zeros_like(close).scatter_(1, close.topk(k, dim=1).indices, 1))
        kernel = x @ x.T
        kernels.append(kernel if variant != "paper" else kernel - kernel.mean(1, keepdim=True))

    def align(p: int, q: int) -> Tensor:
        mask, n = near[p] * near[q], len(a)
        left, right = (kernels[p] * mask), (kernels[q] * mask)
        if variant == "paper":
            return (left * right).sum()
        chain = left.sum(0) @ right.sum(1)
        sums = left.sum() * right.sum() / ((n - 1) * (n - 2))
        return ((left * right.T).sum() + sums - 2 * chain / (n - 2)) / (n * (n - 3))

    norm = (align(0, 0) * align(1, 1)).sqrt() + (1e-6 if variant != "paper" else 0)
    return (align(0, 1) / norm).item()


def measure(way: str, variant: str, num: int, width: int) -> dict:
    """Run one implementation in this process: its value, seconds, and the MiB by which peak memory grew."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(num, width, generator=g)
    b = a @ torch.randn(width, width, generator=g) / width**0.5 + torch.randn(num, width, generator=g)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    measured: Callable[..., float] = cknna if way == "repa" else plain
    value = measured(a, b, K, variant)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"way": way, "variant": variant, "num": num, "width": width, "value": value,
            "seconds": time.perf_counter() - begin, "mebibytes": grown}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000, help="images for the large run, repa only")
    parser.add_argument("--plain-num", type=int, default=4_000, help="images for the comparison of both")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", default="", help="write the rows to this .json file")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)  # WAY,VARIANT,NUM: set in the child process
    given = parser.parse_args()
    if given.one:
        way, variant, num = given.one.split(",")
        print(json.dumps(measure(way, variant, int(num), given.width)))
        return
    rows = []
    print(f"{'way':<8}{'variant':<17}{'images':>8}{'width':>7}{'value':>14}{'seconds':>10}{'MiB':>8}")
    for variant in ("paper", "platonic-clamped"):
        for way, num in (("plain", given.plain_num), ("repa", given.plain_num), ("repa", given.num)):
            one = [sys.executable, __file__, "--one", f"{way},{variant},{num}", "--width", str(given.width)]
            row = json.loads(subprocess.run(one, capture_output=True, text=True, check=True).stdout)
            rows.append(row)
            print(
                f"{way:<8}{variant:<17}{num:>8}{given.width:>7}{row['value']:>14.10f}{row['seconds']:>10.1f}"
                f"{row['mebibytes']:>8.0f}"
            )
    if given.out:
        with open(given.out, "w") as file:
            json.dump(
                {"k": K, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()
