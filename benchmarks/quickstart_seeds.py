"""What the quickstart shows over several seeds: both recipes trained for each seed on the same data, and a table.

    python benchmarks/quickstart_seeds.py --out seeds/photographs
    python benchmarks/quickstart_seeds.py --out seeds/cifar10 --source cifar10-train.zip

Stopped, it continues by the same command; finished, it only prints the table again. `--jobs 2` trains two runs at a time with
half the threads each.
"""

import argparse
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repa.report import speedup, summary_rows
from repa.report.records import read_runs

RECIPES = {"baseline": "quickstart", "aligned": "quickstart-repa"}


def repa(*arguments: str, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "repa", *arguments], check=True, env=environment)


def table(out: Path, seeds: list[int]) -> str:
    """A Markdown table: a row per seed, and means."""
    lines = [
        "| seed | baseline, final | aligned, final | aligned reached the baseline's final after | times fewer |",
        "|---|---|---|---|---|",
    ]
    finals: dict[str, list[float]] = {name: [] for name in RECIPES}
    factors = []
    for seed in seeds:
        runs = [out / f"{name}-{seed}" for name in RECIPES]
        rows = summary_rows(runs)
        for name, row in zip(RECIPES, rows, strict=True):
            finals[name].append(row["frechet_distance"])
        found = speedup(*read_runs(runs))
        reached = "not reached"
        if found is not None and found.steps is not None:
            factors.append(found.baseline_steps / found.steps)
            reached = f"{found.steps:,.0f} of {found.baseline_steps:,.0f} steps | {factors[-1]:.2f}"
        lines.append(f"| {seed} | {finals['baseline'][-1]:.2f} | {finals['aligned'][-1]:.2f} | {reached} |")
    means = [f"{statistics.mean(finals[name]):.2f}" for name in RECIPES]
    factor = f"{statistics.mean(factors):.2f}" if len(factors) == len(seeds) else ""
    return "\n".join([*lines, f"| mean | {means[0]} | {means[1]} | | {factor} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="photographs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="after --: options of `repa train` for every run")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    data = args.out / "data"
    repa("prepare", args.source, str(data), "--resolution", "32", "--features", "tiny", threads=cores)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(
                repa,
                "train",
                recipe,
                "--data",
                str(data),
                "--out",
                str(args.out / f"{name}-{seed}"),
                "--seed",
                str(seed),
                *args.overrides,
                threads=max(1, cores // args.jobs),
            )  # fmt: skip
            for seed in args.seeds
            for name, recipe in RECIPES.items()
        ]
        for job in jobs:
            job.result()
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
