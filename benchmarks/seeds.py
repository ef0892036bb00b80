"""What alignment does over several seeds: a recipe without and one with it, trained for each seed on the same data; a table.

    python benchmarks/seeds.py --out seeds/photographs
    python benchmarks/seeds.py --out seeds/cifar10 --source cifar10-train.zip
    python benchmarks/seeds.py --out seeds/tokens --source cifar10-train.zip --recipes cifar10 cifar10-repa --seeds 0 1

Stopped, it continues by the same command; finished, it only prints the table again. `--jobs 2` trains two runs at a time with
half the threads each.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repa.report import speedup

NAMES = ("baseline", "aligned")  # of the runs, in the order of --recipes


def repa(*arguments: str, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "repa", *arguments], check=True, env=environment)


def table(out: Path, seeds: list[int]) -> str:
    """A Markdown table: a row per seed, and means."""
    lines = [
        "| seed | baseline, final | aligned, final | aligned has the baseline's final after | times fewer |",
        "|---|---|---|---|---|",
    ]
    finals: list[tuple[float, float]] = []
    factors: list[float] = []
    for seed in seeds:
        found = speedup(*(out / f"{name}-{seed}" for name in NAMES))
        assert found is not None, "both runs are evaluated by the same recipe"
        finals.append((found.target, found.aligned_final["frechet_distance"]))
        reached = "not reached | "
        if found.aligned is not None:
            factors.append(found.times_steps)
            reached = f"{found.aligned.step:,.0f} instead of {found.baseline.step:,.0f} steps | {found.times_steps:.2f}"
        lines.append(f"| {seed} | {finals[-1][0]:.2f} | {finals[-1][1]:.2f} | {reached} |")
    baseline, aligned = (f"{statistics.mean(column):.2f}" for column in zip(*finals, strict=True))
    factor = f"{statistics.mean(factors):.2f}" if len(factors) == len(seeds) else ""
    return "\n".join([*lines, f"| mean | {baseline} | {aligned} | | {factor} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="photographs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--recipes", nargs=2, default=["quickstart", "quickstart-repa"], metavar=("BASELINE", "ALIGNED")
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="after --: options of `repa train` for every run")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    data = args.out / "data"
    repa("prepare", args.source, str(data), "--resolution", "32", "--features", "tiny", threads=cores)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        for seed, (name, recipe) in itertools.product(args.seeds, zip(NAMES, args.recipes, strict=True)):
            words = [
                "--data",
                str(data),
                "--out",
                str(args.out / f"{name}-{seed}"),
                "--seed",
                str(seed),
                *args.overrides,
            ]
            jobs.append(pool.submit(repa, "train", recipe, *words, threads=max(1, cores // args.jobs)))
        for job in jobs:
            job.result()
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
