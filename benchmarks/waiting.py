"""Measure how the waiting policy of OpenMP's threads affects small operators, on idle cores and on busy ones.

    python benchmarks/waiting.py

Each measurement runs alone and next to a program that keeps one core busy. Threads spin 300,000 times before they sleep
(the default), spin briefly (`repa.base.launch.spin_briefly`), or do not spin. Each policy runs in a separate process,
in turn. The operators have the size of the quickstart's network: products of about a thousand rows.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from repa.base.launch import SPINS

OPERATORS = """
import time, torch
torch.set_num_threads({threads})
x, w = torch.randn(1024, 128), torch.randn(128, 512)
for part in (False, True):  # once to warm up
    begin = time.perf_counter()
    for _ in range({times}):
        torch.nn.functional.gelu(x @ w)
    took = time.perf_counter() - begin
print(took)
"""


def spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def beside(programs: int) -> Iterator[None]:
    """Run `programs` processes that each keep one core busy."""
    running = [multiprocessing.Process(target=spin, daemon=True) for _ in range(programs)]
    for process in running:
        process.start()
    try:
        yield
    finally:
        for process in running:
            process.kill()


def seconds(setting: dict[str, str], threads: int, times: int) -> float:
    code = OPERATORS.format(threads=threads, times=times)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))
    } | setting
    return float(
        subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True).stdout
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--times", type=int, default=1000)
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    settings = {"by default": {}, "briefly": {"GOMP_SPINCOUNT": SPINS}, "not at all": {"OMP_WAIT_POLICY": "PASSIVE"}}
    print(
        f"{threads} threads, seconds of {args.times:,} products with GELU, median of {args.rounds} rounds, by how they spin"
    )
    for programs in (0, 1):
        with beside(programs):
            rounds = [[seconds(s, threads, args.times) for s in settings.values()] for _ in range(args.rounds)]
        medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
        told = ", ".join(f"{name} {took:.2f}" for name, took in zip(settings, medians, strict=True))
        print(f"  beside {programs} programs: {told}; {medians[0] / medians[1]:.2f} times as fast as by default")


if __name__ == "__main__":
    main()
