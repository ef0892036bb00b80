"""Runs that differ in the seed only, taken together: groups, means and spreads, speed-ups over seeds."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, stdev
from typing import Any, NamedTuple

from repa.report.runs import RunRecord
from repa.report.summary import Speedup, speedup


@dataclass(frozen=True)
class Group:
    """Runs of one configuration and one data set, each with a seed of its own; often just one."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def is_aligned(self) -> bool:
        return self.runs[0].is_aligned

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


class Spread(NamedTuple):
    """Several values of one quantity, one a seed."""

    mean: float
    deviation: float | None  # standard deviation over seeds, n - 1; None of one value
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class GroupSpeedup:
    """How soon the runs of a group had the final distance of baselines: a `Speedup` for each pair."""

    baseline: Group
    aligned: Group
    pairs: tuple[Speedup, ...]
    by_seed: bool  # each run with the baseline of its seed; else every run with every baseline

    @property
    def reached(self) -> list[Speedup]:
        return [pair for pair in self.pairs if pair.aligned is not None]

    @property
    def is_bound(self) -> bool:
        """Some run was there at its first evaluation already: its factor is a least one."""
        return any(pair.aligned.is_bound for pair in self.reached)

    def factors(self, of: str) -> Spread | None:
        """Of "steps", "seconds" or "images", over all pairs; None unless all got there: a mean of those that did flatters."""
        per_step = self.baseline.runs[0].batch_size, self.aligned.runs[0].batch_size
        values = [pair.times_seconds if of == "seconds" else pair.times_steps for pair in self.pairs]
        if any(value is None for value in values) or (of == "images" and None in per_step):
            return None
        ratio = per_step[0] / per_step[1] if of == "images" else 1.0
        return spread([value * ratio for value in values])


def spread(values: Sequence[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values), len(values))


def grouped(records: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first runs. Runs of the same seed are no sample over seeds, and stay apart."""
    members: list[tuple[str, list[RunRecord]]] = []
    for run in records:
        key = _all_but_the_seed(run)
        fitting = (runs for other, runs in members if other == key and run.seed not in {one.seed for one in runs})
        home = next(fitting, None)
        if home is None:
            members.append((key, [run]))
        else:
            home.append(run)
    groups = [Group(_name([run.name for run in runs]), tuple(runs)) for _, runs in members]
    names = [group.name for group in groups]
    return [
        group if names.count(group.name) == 1 else Group(" + ".join(run.name for run in group.runs), group.runs)
        for group in groups
    ]


def group_indices(records: Sequence[RunRecord], groups: Sequence[Group]) -> list[int]:
    """For each run the number of its group."""
    places = {run.name: number for number, group in enumerate(groups) for run in group.runs}
    return [places[run.name] for run in records]


def group_speedups(groups: Sequence[Group]) -> list[GroupSpeedup]:
    """Every aligned group against the first group trained without alignment, where evaluations can be compared."""
    baseline = next((group for group in groups if not group.is_aligned), None)
    if baseline is None:
        return []
    found = [_compared(baseline, group) for group in groups if group.is_aligned]
    return [each for each in found if each is not None]


def _compared(baseline: Group, aligned: Group) -> GroupSpeedup | None:
    """Pairs of the same seed start from the same network and see the same data; other seeds pair all with all."""
    seeds = [{run.seed: run for run in group.runs} for group in (baseline, aligned)]
    by_seed = seeds[0].keys() == seeds[1].keys()
    if by_seed:
        pairs = [(seeds[0][seed], run) for seed, run in seeds[1].items()]
    else:
        pairs = [(ours, theirs) for theirs in aligned.runs for ours in baseline.runs]
    found = [speedup(*pair) for pair in pairs]
    if None in found or len({pair.protocol for pair in found}) > 1:
        return None
    return GroupSpeedup(baseline, aligned, tuple(found), by_seed)


def _all_but_the_seed(run: RunRecord) -> str:
    config: dict[str, Any] = {key: value for key, value in run.config.items() if key != "seed"}
    return json.dumps([config, run.data], sort_keys=True, default=str)


def _name(names: Sequence[str]) -> str:
    """'baseline' for runs/0/baseline and runs/1/baseline, and for baseline-0 and baseline-1."""
    if len(names) == 1:
        return names[0]
    last = {name.rpartition("/")[2] for name in names}
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = last.pop() if len(last) == 1 else "".join(letters[0] for letters in alike)
    return re.sub(r"([-_. /=]+(seed)?[-_=]?\d*|seed\d*)$", "", common) or " + ".join(names)  # cifar10-1 is cifar10
