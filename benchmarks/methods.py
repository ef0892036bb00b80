"""The methods around REPA on one small network and one data set: distances at equal steps and at equal seconds; a table.

    python benchmarks/methods.py --out methods --source cifar10-train.zip
    python benchmarks/methods.py --out methods --source cifar10-train.zip --methods cifar10 cifar10-layersync --seeds 0 1 2
    repa report methods/runs/* --out methods/report.html

Every run is a recipe of `repa list recipes` that begins with cifar10, so all share network, data, optimizer and budget. Stopped,
it continues by the same command; finished, it only prints the table again. The first recipe is the baseline.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from repa.report import read_run

METHODS = (
    "cifar10", "cifar10-repa", "cifar10-irepa", "cifar10-reg", "cifar10-layersync", "cifar10-sra", "cifar10-vae-repa",
    "cifar10-dispersive", "cifar10-internal-guidance",
)  # fmt: skip


def repa(*arguments: str, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "repa", *arguments], check=True, env=environment)


def distances(run: Path) -> list[dict[str, Any]]:
    """Its evaluations in the order of steps: step, seconds spent in training, frechet_distance."""
    record = read_run(run)
    (protocol,) = record.protocols
    return record.distances(protocol)


def after(rows: list[dict[str, Any]], seconds: float) -> float:
    """The distance after so many seconds of training, on the straight line between evaluations; the last where it was done before."""
    for row, following in itertools.pairwise(rows):
        if row["seconds"] <= seconds <= following["seconds"]:
            part = (seconds - row["seconds"]) / (following["seconds"] - row["seconds"])
            return row["frechet_distance"] + part * (following["frechet_distance"] - row["frechet_distance"])
    return rows[0 if seconds < rows[0]["seconds"] else -1]["frechet_distance"]


def table(out: Path, methods: list[str], seeds: list[int]) -> str:
    """A Markdown table: a row per method, its seeds and their mean, and how it stands against the first."""
    found = {method: [distances(out / "runs" / f"{method}-{seed}") for seed in seeds] for method in methods}
    budgets = [rows[-1]["seconds"] for rows in found[methods[0]]]
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "minus the first", "seconds a run", "at the first's seconds"]
    lines = ["| recipe | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    first = [rows[-1]["frechet_distance"] for rows in found[methods[0]]]
    for method, runs in found.items():
        final = [rows[-1]["frechet_distance"] for rows in runs]
        gained = statistics.mean(own - other for own, other in zip(final, first, strict=True))
        took = statistics.mean(rows[-1]["seconds"] for rows in runs)
        equal = statistics.mean(after(rows, budget) for rows, budget in zip(runs, budgets, strict=True))
        cells = [*(f"{value:.2f}" for value in (*final, statistics.mean(final))), f"{gained:+.2f}"]
        lines.append(f"| `{method}` | " + " | ".join([*cells, f"{took:.0f}", f"{equal:.2f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default="cifar10-train.zip")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="after --: options of `repa train` for every run")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    data = args.out / "data"
    repa("prepare", args.source, str(data), "--resolution", "32", "--features", "tiny", threads=cores)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        for seed, method in itertools.product(args.seeds, args.methods):
            run = args.out / "runs" / f"{method}-{seed}"
            words = ["--data", str(data), "--out", str(run), "--seed", str(seed), *args.overrides]
            jobs.append(pool.submit(repa, "train", method, *words, threads=max(1, cores // args.jobs)))
        for job in jobs:
            job.result()
    print(table(args.out, args.methods, args.seeds))


if __name__ == "__main__":
    main()
