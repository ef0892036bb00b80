"""Train a recipe with and without alignment over several seeds on the same data, and print tables.

    python benchmarks/seeds.py --out seeds/photographs --jobs 2
    python benchmarks/seeds.py --out seeds/cifar10 --source cifar10-train.zip --jobs 2
    python benchmarks/seeds.py --out seeds/tokens --source cifar10-train.zip --recipes cifar10 cifar10-repa --seeds 0 1

The samples of every preview are kept and measured in the features of each encoder, with one table per encoder. The same
command continues an interrupted comparison and prints the tables of a finished one again. `--jobs 2` trains two runs at
a time with half the threads each.
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

import torch

from repa.base import files
from repa.cli.quickstart import crops
from repa.evaluation import EvaluateConfig, evaluate_file
from repa.recipes import load_recipe
from repa.report.speedups import first_reached
from repa.runs import layout, read_metrics

NAMES = ("baseline", "aligned")  # names of the runs, in the order of --recipes
Rows = list[dict[str, Any]]


def repa(*arguments: str, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "repa", *arguments], check=True, env=environment)


def distances(runs: list[Path], reference: Path, extractor: str) -> dict[Path, Rows]:
    """Run -> step and Fréchet distance of each preview's samples, in the features of one encoder.

    Results are stored in the run's folder in the format of `repa evaluate`, so `repa report` finds them; stored results
    are not measured again.
    """
    found: dict[Path, Rows] = {}
    for run in runs:
        made = {row["step"]: row for row in read_metrics(run) if row["kind"] == "eval"}
        found[run] = []
        for step in layout.preview_steps(run):
            file = run / layout.EVALUATIONS / f"{layout.step_name(step)}-{extractor}.json"
            if not file.is_file():
                config = EvaluateConfig(features=extractor, metrics=("fd",))
                samples = layout.preview(run, step, ".npz")
                results = evaluate_file(samples, reference, config, device=torch.device("cpu"))
                files.write_json(file, results | {"made": made[step]})
            results = files.read_json(file)
            row = {"step": step, "frechet_distance": results["metrics"]["fd"], "num_samples": results["num_samples"]}
            found[run].append(row)
    return found


def table(out: Path, seeds: list[int], found: dict[Path, Rows]) -> str:
    """A Markdown table with one row per seed, and means."""
    lines = [
        "| seed | baseline, final | aligned, final | aligned has the baseline's final after | times fewer |",
        "|---|---|---|---|---|",
    ]
    finals: list[tuple[float, float]] = []
    factors: list[float] = []
    for seed in seeds:
        baseline, aligned = (found[out / f"{name}-{seed}"] for name in NAMES)
        target = baseline[-1]["frechet_distance"]
        finals.append((target, aligned[-1]["frechet_distance"]))
        first, reached = first_reached(baseline, target), first_reached(aligned, target)
        assert first is not None, "its last evaluation is at the target"
        told = "not reached | "
        if reached is not None:
            factors.append(first.step / reached.step)
            least = "≥ " if reached.is_bound else ""
            told = f"{reached.step:,.0f} instead of {first.step:,.0f} steps | {least}{factors[-1]:.2f}"
        lines.append(f"| {seed} | {finals[-1][0]:.2f} | {finals[-1][1]:.2f} | {told} |")
    means = " | ".join(f"{statistics.mean(column):.2f}" for column in zip(*finals, strict=True))
    factor = f"{statistics.mean(factors):.2f}" if len(factors) == len(seeds) else ""
    return "\n".join([*lines, f"| mean | {means} | | {factor} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", default=crops(), help="default: the source of the quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--recipes", nargs=2, default=["quickstart", "quickstart-repa"], metavar=("BASELINE", "ALIGNED")
    )
    parser.add_argument("--reference", type=Path, help="prepared data or .npz; default: the training images")
    parser.add_argument("--features", nargs="+", default=["tiny-classifier", "lite0"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="after --: options of `repa train` for every run")
    args = parser.parse_args()
    cores = os.cpu_count() or 1
    data = args.out / "data"
    repa("prepare", args.source, str(data), "--resolution", "32", "--features", "tiny", threads=cores)
    num = load_recipe(args.recipes[0]).preview.num_scored
    runs = []
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = []
        for seed, (name, recipe) in itertools.product(args.seeds, zip(NAMES, args.recipes, strict=True)):
            runs.append(args.out / f"{name}-{seed}")
            words = ["--data", str(data), "--out", str(runs[-1]), "--seed", str(seed), "--preview.num-images", str(num)]
            words += ["--preview.num-scored", "0", *args.overrides]
            jobs.append(pool.submit(repa, "train", recipe, *words, threads=max(1, cores // args.jobs)))
        for job in jobs:
            job.result()
    for extractor in args.features:
        found = distances(runs, args.reference or data, extractor)
        print(f"\n{extractor}, {found[runs[0]][-1]['num_samples']} samples:\n")
        print(table(args.out, args.seeds, found), flush=True)


if __name__ == "__main__":
    main()
