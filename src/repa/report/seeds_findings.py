"""The sentence on top of the page where runs differ in the seed only: what holds over seeds, and how far it spreads."""

from collections.abc import Sequence

from repa.report.configs import config_differences
from repa.report.runs import DISTANCE, distance_name
from repa.report.seeds import Group, GroupSpeedup, group_speedups, spread
from repa.report.text import Verdict, count, factor, figure, listed, times

FEW = 5  # seeds: below, a standard deviation is itself only roughly known


def verdict_over_seeds(groups: Sequence[Group]) -> Verdict:
    """The group that had the baseline's final distance soonest, or the ends of all groups where none can be compared."""
    found = group_speedups(groups)
    if not found:
        return Verdict(
            _ends(groups), ["Nothing is compared: a baseline and aligned runs evaluated in the same way are needed."]
        )
    whole = [each for each in found if each.factors("steps")]
    if whole:
        best = max(whole, key=lambda each: each.factors("steps").mean)
        return Verdict(_reached(best, len(found)), _notes(best))
    best = max(found, key=lambda each: len(each.reached) / len(each.pairs))
    return Verdict(_partly(best, len(found)), _notes(best))


def _reached(found: GroupSpeedup, num_compared: int) -> str:
    factors, steps = found.factors("steps"), spread([pair.aligned.step for pair in found.pairs])
    gain = times(factors.mean, "fewer", "more", found.is_bound)
    extent = f"{factor(factors.low)} to {factor(factors.high)}" if factors.num > 1 else "one pair"
    among = "" if num_compared == 1 else f", the fastest of {num_compared} aligned configurations,"
    return (
        f"{found.aligned.label}{among} reached the final {_distance(found)} of {found.baseline.label} "
        f"after {count(steps.mean)} steps on average: {gain} ({_how_many(found)}: {extent})."
    )


def _partly(found: GroupSpeedup, num_compared: int) -> str:
    among = "" if num_compared == 1 else f", the nearest of {num_compared} aligned configurations,"
    num = len(found.reached)
    if not num:
        return f"{found.aligned.label}{among} did not reach the final {_distance(found)} of {found.baseline.label} with any seed."
    return (
        f"{found.aligned.label}{among} reached the final {_distance(found)} of {found.baseline.label} in {num} of "
        f"{len(found.pairs)} comparisons, so no mean speed-up is stated."
    )


def _how_many(found: GroupSpeedup) -> str:
    return f"{len(found.pairs)} pairs of the same seed" if found.by_seed else f"all {len(found.pairs)} pairs"


def _distance(found: GroupSpeedup) -> str:
    return distance_name(found.pairs[0].protocol)


def _notes(found: GroupSpeedup) -> list[str]:
    notes = []
    if found.by_seed:
        notes.append("Each aligned run is compared with the baseline of its seed, which started from the same network.")
    else:
        notes.append("Seeds of baseline and aligned runs differ, so every run is compared with every baseline.")
    if len(found.baseline.runs) == 1:
        notes.append("There is one baseline: how much its distance moves with the seed was not measured.")
    if seconds := found.factors("seconds"):
        notes.append(
            f"In training time: {times(seconds.mean, 'less', 'more', found.is_bound)} "
            f"({factor(seconds.low)} to {factor(seconds.high)})."
        )
    if found.is_bound:
        notes.append("Some run was there at its first evaluation already, perhaps earlier.")
    least = min(len(found.baseline.runs), len(found.aligned.runs))
    if least < FEW:
        notes.append(f"With {least} seed{'s' if least > 1 else ''} the spread itself is only roughly known.")
    others = config_differences([found.baseline.runs[0], found.aligned.runs[0]])
    other = [name for name, _ in others if name.split(".")[0] not in ("alignments", "seed")]
    if other:
        notes.append(f"The configurations also differ in {listed(other)}: the comparison is not of alignment alone.")
    if found.baseline.runs[0].data != found.aligned.runs[0].data:
        notes.append("The runs were not trained on the same data (their data.json differ).")
    return notes


def _ends(groups: Sequence[Group]) -> str:
    ends = []
    for group in groups:
        protocol = next((p for run in group.runs for p in run.protocols), None)
        if protocol is None:
            continue
        last = [rows[-1][DISTANCE] for run in group.runs if (rows := run.distances(protocol))]
        found = spread(last)
        extent = f" ({figure(found.low)} to {figure(found.high)})" if found.num > 1 else ""
        ends.append(f"{group.label}: {distance_name(protocol)} {figure(found.mean)}{extent} at the end")
    return (
        "; ".join(ends) + "."
        if ends
        else "There are no evaluations, so nothing can be said about the quality of samples."
    )
