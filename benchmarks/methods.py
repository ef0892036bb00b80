"""Compare the methods related to REPA on one small network and one data set, at equal steps and at equal time.

    python benchmarks/methods.py --out methods --source cifar10-train.zip
    python benchmarks/methods.py --out methods --source cifar10-train.zip --seeds 0 1 2 \
        --methods cifar10 cifar10-layersync
    repa report methods/runs/* --out methods/report.html

Every run uses a recipe of `repa list recipes` whose name begins with cifar10, so all share network, data, optimizer and
budget. The first recipe is the baseline. The same command continues an interrupted comparison and prints the table of a
finished one again.

Equal time: the wall time of a run says little on a machine that does other work. So the cost of a step is measured
after the runs, in processor time, with the methods taking turns. A method whose step costs r times the baseline's is
compared after 1 / r of its steps, interpolated linearly between evaluations.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from repa.data import Loader, open_data
from repa.performance.batches import in_memory
from repa.performance.measure import MeasuredStep
from repa.report import read_run
from repa.runs import layout
from repa.training.config import TrainConfig
from repa.training.inputs import EncoderFeatures
from repa.training.resolve import resolve, with_streams

METHODS = (
    "cifar10", "cifar10-repa", "cifar10-irepa", "cifar10-reg", "cifar10-layersync", "cifar10-sra", "cifar10-dispersive",
    "cifar10-internal-guidance",
)  # fmt: skip


def repa(*arguments: str, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "repa", *arguments], check=True, env=environment)


def distances(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run by step: step, frechet_distance."""
    record = read_run(run)
    (protocol,) = record.protocols
    return record.distances(protocol)


def step_of(run: Path, data: Path) -> MeasuredStep:
    """The training step of a finished run, repeated on one batch with stored tokens."""
    device, opened = torch.device("cpu"), open_data(data)
    config = resolve(TrainConfig.load(run / layout.CONFIG), opened, device)
    encoders = EncoderFeatures(config, opened, device)
    config, needs = with_streams(config, encoders.dims), encoders.wanted
    loader = Loader(
        opened, batch_size=config.batch_size, seed=0, features=encoders.stored(needs), images=encoders.reads_images(needs),
        pooled=encoders.pooled, device=device,
    )  # fmt: skip
    batch = loader.batch(0)
    return MeasuredStep(config, in_memory(encoders.dims, batch, encoders(batch, needs)), device)


def costs(steps: dict[str, MeasuredStep], rounds: int = 9, each: int = 3) -> dict[str, float]:
    """Method -> processor time of a step relative to the first method: the median over rounds that take turns."""
    seconds: dict[str, list[float]] = {method: [] for method in steps}
    for number, (method, step) in itertools.product(range(rounds + 1), steps.items()):
        begin = time.process_time()
        for _ in range(each):
            step()
        if number:  # the first round warms up
            seconds[method].append(time.process_time() - begin)
    first = seconds[next(iter(steps))]
    return {m: statistics.median(own / other for own, other in zip(s, first, strict=True)) for m, s in seconds.items()}


def after(rows: list[dict[str, Any]], step: float) -> float | None:
    """The distance after `step` steps, interpolated linearly between evaluations; None before the first evaluation."""
    for row, following in itertools.pairwise(rows):
        if row["step"] <= step <= following["step"]:
            part = (step - row["step"]) / (following["step"] - row["step"])
            return row["frechet_distance"] + part * (following["frechet_distance"] - row["frechet_distance"])
    return rows[-1]["frechet_distance"] if step >= rows[-1]["step"] else None


def table(out: Path, methods: list[str], seeds: list[int]) -> str:
    """A Markdown table: one row per method with its seeds, their mean and the change relative to the first method."""
    found = {method: [distances(out / "runs" / f"{method}-{seed}") for seed in seeds] for method in methods}
    cost = costs({method: step_of(out / "runs" / f"{method}-{seeds[0]}", out / "data") for method in methods})
    heads = [*(f"seed {seed}" for seed in seeds), "mean", "relative to the baseline", "cost of a step", "at equal time"]
    lines = ["| recipe | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    first = statistics.mean(rows[-1]["frechet_distance"] for rows in found[methods[0]])
    for method, runs in found.items():
        final = [rows[-1]["frechet_distance"] for rows in runs]
        mean = statistics.mean(final)
        equal = [after(rows, rows[-1]["step"] / cost[method]) for rows in runs]
        known = [value for value in equal if value is not None]
        at_equal = f"{statistics.mean(known):.2f}" if len(known) == len(equal) else "-"
        cells = [
            *(f"{value:.2f}" for value in (*final, mean)),
            f"{mean / first - 1:+.0%}",
            f"{cost[method]:.2f}",
            at_equal,
        ]
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
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
