"""Speed-up of an aligned run over the baseline: for a pair of runs, and over runs that differ only in the seed."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from repa.report.runs import DISTANCE, Protocol, RunRecord, is_number, read_runs


@dataclass(frozen=True)
class Reached:
    """The point at which a run first reached a Fréchet distance."""

    step: float
    seconds: float | None
    between: tuple[int, int]  # the evaluations before and after; equal if an evaluation has exactly this distance
    is_bound: bool = False  # the first evaluation had already reached it, so it may have happened earlier
    stays: bool = True  # no later evaluation is above it again


class Overlap(NamedTuple):
    """Two curves at every step at which either was evaluated, within their common range."""

    steps: list[int]
    baseline: list[float]
    aligned: list[float]

    @property
    def num_lower(self) -> int:
        """Number of steps at which the aligned run has the lower distance."""
        return sum(ours < theirs for ours, theirs in zip(self.aligned, self.baseline, strict=True))

    @property
    def num_higher(self) -> int:
        return sum(ours > theirs for ours, theirs in zip(self.aligned, self.baseline, strict=True))

    @property
    def crosses(self) -> bool:
        return self.num_lower > 0 and self.num_higher > 0

    @property
    def difference(self) -> float:
        """Aligned minus baseline at the last step."""
        return self.aligned[-1] - self.baseline[-1]


@dataclass(frozen=True)
class Speedup:
    """When an aligned run reached the baseline's final Fréchet distance, linearly interpolated between evaluations."""

    target: float  # the baseline's final Fréchet distance
    protocol: Protocol
    baseline_final: dict[str, Any]  # the evaluation it is from
    baseline: Reached  # where the baseline FIRST reached it: before its end if its curve is not monotone
    aligned: Reached | None  # None: not reached
    aligned_best: dict[str, Any]  # the aligned run's lowest evaluation
    aligned_final: dict[str, Any]
    overlap: Overlap  # without steps if the evaluations of the two runs do not overlap

    @property
    def is_supported(self) -> bool:
        """Whether the complete curve supports a factor. It does not if the aligned run later rises above the distance again
        or ends above the baseline: the factor would then depend on one early point."""
        if self.aligned is None or self.is_too_coarse or not self.aligned.stays or not self.overlap.steps:
            return False
        return self.overlap.difference < 0 or (self.times_steps or 0.0) <= 1

    @property
    def is_too_coarse(self) -> bool:
        """Whether the aligned run had reached the distance by its first evaluation, and the baseline no later: no factor then."""
        return self.aligned is not None and self.aligned.is_bound and (self.times_steps or 0.0) <= 1

    @property
    def times_steps(self) -> float | None:
        """The baseline's steps over the aligned run's, each to the first time; above 1 means fewer. None if undefined."""
        return _ratio(self.baseline.step, self.aligned.step) if self.aligned else None

    @property
    def times_seconds(self) -> float | None:
        """The same in seconds of training as the runs logged them."""
        return _ratio(self.baseline.seconds, self.aligned.seconds) if self.aligned else None


def speedup(baseline: RunRecord | Path, aligned: RunRecord | Path) -> Speedup | None:
    """When the aligned run first reached the baseline's final Fréchet distance, linearly interpolated between evaluations.

    Returns:
        None if the two share no protocol (features, number of samples, sampler, NFE, weights, ...); of several, the one with
        the most evaluations is used. Otherwise a `Speedup`; its `aligned` is None if the distance was not reached.
    """
    baseline, aligned = read_runs([baseline, aligned])
    common = [protocol for protocol in baseline.protocols if protocol in aligned.protocols]
    if not common:
        return None
    # Of several protocols, the one with which both have a curve: a single evaluation has little meaning.
    protocol = max(common, key=lambda p: min(len(run.distances(p)) for run in (baseline, aligned)))
    rows, aligned_rows = baseline.distances(protocol), aligned.distances(protocol)
    target = rows[-1][DISTANCE]
    first = first_reached(rows, target)
    assert first is not None  # its last evaluation is at the target
    best = min(aligned_rows, key=lambda row: row[DISTANCE])
    reached, overlap = first_reached(aligned_rows, target), _overlap(rows, aligned_rows)
    return Speedup(target, protocol, rows[-1], first, reached, best, aligned_rows[-1], overlap)


def _overlap(rows: Sequence[dict[str, Any]], aligned_rows: Sequence[dict[str, Any]]) -> Overlap:
    """Linear interpolation between evaluations, without extrapolation."""
    steps_of = [[row["step"] for row in rows], [row["step"] for row in aligned_rows]]
    first, last = max(steps[0] for steps in steps_of), min(steps[-1] for steps in steps_of)
    shared = sorted({step for steps in steps_of for step in steps if first <= step <= last})
    baseline = np.interp(shared, steps_of[0], [row[DISTANCE] for row in rows])
    aligned = np.interp(shared, steps_of[1], [row[DISTANCE] for row in aligned_rows])
    return Overlap(shared, baseline.tolist(), aligned.tolist())


def first_reached(rows: Sequence[dict[str, Any]], target: float) -> Reached | None:
    """The first point of the piecewise linear curve (by step) at or below `target`, if any."""
    previous = None
    for number, row in enumerate(rows):
        if row[DISTANCE] <= target:
            # A curve that rises above the target again supports no factor: see `Speedup.is_supported`.
            stays = all(later[DISTANCE] <= target for later in rows[number:])
            if previous is None:
                return Reached(row["step"], row.get("seconds"), (row["step"], row["step"]), True, stays)
            drop = previous[DISTANCE] - row[DISTANCE]
            part = (previous[DISTANCE] - target) / drop  # in (0, 1]: previous is above the target, row is not
            between = (row["step"], row["step"]) if part == 1 else (previous["step"], row["step"])
            step = previous["step"] + part * (row["step"] - previous["step"])
            return Reached(step, _interpolated(previous, row, "seconds", part), between, stays=stays)
        previous = row
    return None


def baseline_of(records: Sequence[RunRecord], run: RunRecord | None = None) -> RunRecord | None:
    """The first run trained without alignment; for `run`, the baseline of the same seed if there is one."""
    first = next((each for each in records if not each.is_aligned), None)
    if first is None or run is None or run.seed == first.seed:
        return first
    changed = {**first.config, "seed": run.seed}
    return next((each for each in records if each.config == changed and each.data == first.data), first)


@dataclass(frozen=True)
class SeedGroup:
    """Runs with the same configuration and data set and different seeds; often only one."""

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def is_aligned(self) -> bool:
        return self.runs[0].is_aligned

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"


class Spread(NamedTuple):
    """Several values of one quantity, one per seed."""

    mean: float
    deviation: float | None  # standard deviation over seeds, n - 1; None for one value
    low: float
    high: float
    num: int


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, min(values), max(values), len(values))


def group_seeds(records: Sequence[RunRecord]) -> list[SeedGroup]:
    """Groups in the order of their first runs. Runs with the same seed are not a sample over seeds, so they stay separate."""
    members: list[tuple[str, list[RunRecord]]] = []
    for run in records:
        key = _all_but_the_seed(run)
        fitting = (runs for other, runs in members if other == key and run.seed not in {one.seed for one in runs})
        home = next(fitting, None)
        if home is None:
            members.append((key, [run]))
        else:
            home.append(run)
    groups = [SeedGroup(_common_name([run.name for run in runs]), tuple(runs)) for _, runs in members]
    # Groups that would share a name, such as runs of one seed, are called by all their members.
    names = [group.name for group in groups]
    return [
        group if names.count(group.name) == 1 else SeedGroup(" + ".join(run.name for run in group.runs), group.runs)
        for group in groups
    ]


def group_indices(records: Sequence[RunRecord], groups: Sequence[SeedGroup]) -> list[int]:
    """The group index of each run."""
    places = {run.name: number for number, group in enumerate(groups) for run in group.runs}
    return [places[run.name] for run in records]


@dataclass(frozen=True)
class SeedSpeedup:
    """When the runs of a group reached the final distance of the baselines: one `Speedup` per pair."""

    baseline: SeedGroup
    aligned: SeedGroup
    pairs: tuple[Speedup, ...]
    by_seed: bool  # pairs of equal seeds; otherwise every run with every baseline

    @property
    def reached(self) -> list[Speedup]:
        return [pair for pair in self.pairs if pair.aligned is not None]

    @property
    def is_bound(self) -> bool:
        """Whether a run had reached the distance by its first evaluation: its factor is then a lower bound."""
        return any(pair.aligned is not None and pair.aligned.is_bound for pair in self.pairs)

    def factors(self, of: str) -> Spread | None:
        """Of "steps", "seconds" or "images", over all pairs; None unless every pair's `is_supported`: a mean of those that do flatters."""
        if not all(pair.is_supported for pair in self.pairs):
            return None
        found = [pair.times_seconds if of == "seconds" else pair.times_steps for pair in self.pairs]
        values = [value for value in found if value is not None]
        # Some run logged no time.
        if len(values) < len(found):
            return None
        ratio = 1.0
        if of == "images":
            ours, theirs = self.baseline.runs[0].batch_size, self.aligned.runs[0].batch_size
            if ours is None or theirs is None:
                return None
            ratio = ours / theirs
        return spread([value * ratio for value in values])


def speedups_of_groups(groups: Sequence[SeedGroup]) -> list[SeedSpeedup]:
    """Every aligned group against the first group without alignment, if their evaluations are comparable."""
    baseline = next((group for group in groups if not group.is_aligned), None)
    if baseline is None:
        return []
    found = [_speedup_of_groups(baseline, group) for group in groups if group.is_aligned]
    return [each for each in found if each is not None]


def _speedup_of_groups(baseline: SeedGroup, aligned: SeedGroup) -> SeedSpeedup | None:
    """Runs with the same seed start from the same network and see the same data; without equal seeds, all pairs are formed."""
    seeds = [{run.seed: run for run in group.runs} for group in (baseline, aligned)]
    by_seed = seeds[0].keys() == seeds[1].keys()
    if by_seed:
        pairs = [(seeds[0][seed], run) for seed, run in seeds[1].items()]
    else:
        pairs = [(ours, theirs) for theirs in aligned.runs for ours in baseline.runs]
    found = [each for pair in pairs if (each := speedup(*pair)) is not None]
    # Factors of pairs with different protocols have no common mean.
    if len(found) < len(pairs) or len({pair.protocol for pair in found}) > 1:
        return None
    return SeedSpeedup(baseline, aligned, tuple(found), by_seed)


def _all_but_the_seed(run: RunRecord) -> str:
    config: dict[str, Any] = {key: value for key, value in run.config.items() if key != "seed"}
    return json.dumps([config, run.data], sort_keys=True, default=str)


def _common_name(names: Sequence[str]) -> str:
    """'baseline' for runs/0/baseline and runs/1/baseline, and for baseline-0 and baseline-1."""
    if len(names) == 1:
        return names[0]
    last = {name.rpartition("/")[2] for name in names}
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    common = last.pop() if len(last) == 1 else "".join(letters[0] for letters in alike)
    return re.sub(r"([-_. /=]+(seed)?[-_=]?\d*|seed\d*)$", "", common) or " + ".join(names)  # cifar10-1 is cifar10


def _interpolated(a: dict[str, Any], b: dict[str, Any], key: str, part: float) -> float | None:
    return a[key] + part * (b[key] - a[key]) if is_number(a.get(key)) and is_number(b.get(key)) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
