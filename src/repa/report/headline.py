"""The sentence on top of the page, computed from the evaluations, and what a careful reader must also know."""

from collections.abc import Sequence
from typing import NamedTuple

from repa.base.registry import parse_spec
from repa.base.units import duration
from repa.encoders import ENCODERS
from repa.report.runs import DISTANCE, RunRecord, distance_name
from repa.report.speedups import Group, GroupSpeedup, Reached, Speedup, group_speedups, grouped, spread
from repa.report.summary import config_differences
from repa.report.text import count, factor, figure, listed, times

FEW = 5  # seeds: below, a standard deviation is itself only roughly known


class Verdict(NamedTuple):
    """The sentence on top of the page, and the remarks that stand under it."""

    sentence: str
    notes: list[str]
    meaning: str = ""
    """What was compared, for a reader who does not know the method."""


def verdict(records: Sequence[RunRecord]) -> Verdict:
    """What the runs show, never more than they show."""
    groups = grouped(records)
    compared = group_speedups(groups)
    if not compared:
        return _without_comparison(groups)
    return _over_seeds(compared) if len(groups) < len(records) else _of_single_runs(compared, records)


def _of_single_runs(compared: Sequence[GroupSpeedup], records: Sequence[RunRecord]) -> Verdict:
    """The run that had the baseline's final distance soonest, or else the one that came nearest."""
    baseline, num_aligned = compared[0].baseline.runs[0], sum(run.is_aligned for run in records)
    pairs = [(each.aligned.runs[0], each.pairs[0]) for each in compared]
    reached = [(found.aligned.step, run, found) for run, found in pairs if found.aligned]
    if reached:
        _, run, found = min(reached, key=lambda each: each[0])
    else:
        run, found = min(pairs, key=lambda pair: pair[1].aligned_best[DISTANCE])
    ours = "the aligned run" if num_aligned == 1 else run.name
    theirs = "the baseline" if len(records) == num_aligned + 1 else baseline.name
    sentence = (_reached if reached else _not_reached)(ours, theirs, found, len(pairs))
    differences = _other_differences(baseline, run)
    notes = [*_details(ours, theirs, found), *differences]
    notes.append(
        "One run each: how much these numbers would move with another seed was not measured, and a Fréchet distance "
        "compares only with distances made in the same way."
    )
    return Verdict(sentence, notes, "" if differences else _meaning(ours, theirs, run))


def _reached(ours: str, theirs: str, found: Speedup, num_compared: int) -> str:
    who = _first_upper(ours) if num_compared == 1 else f"{ours}, the fastest of {num_compared} aligned runs,"
    there = found.aligned
    assert there is not None
    end, step = found.baseline_final["step"], count(there.step)
    when = f"by its first evaluation, at {step} steps" if there.is_bound else f"after {step} steps"
    ratio = found.times_steps
    if ratio is None or (there.is_bound and ratio <= 1):  # a bound that says nothing
        gain = ""
    else:
        gain = f": {times(ratio, 'fewer', 'more', there.is_bound)}"
        if found.baseline.step < end:
            gain += f" than the {count(found.baseline.step)} after which {theirs} itself first had it"
    what = f"{theirs}’s final {distance_name(found.protocol)} ({figure(found.target)} at {count(end)} steps)"
    return f"{who} reached {what} {when}{gain}."


def _not_reached(ours: str, theirs: str, found: Speedup, num_compared: int) -> str:
    single = num_compared == 1
    who = f"{_first_upper(ours)} did not reach" if single else f"None of the {num_compared} aligned runs reached"
    best, end = found.aligned_best, count(found.baseline_final["step"])
    closest = "its lowest was" if single else f"the lowest was {ours}’s"
    return (
        f"{who} {theirs}’s final {distance_name(found.protocol)} ({figure(found.target)} at {end} steps): "
        f"{closest} {figure(best[DISTANCE])}, at {count(best['step'])} steps."
    )


def _first_upper(words: str) -> str:
    """Our own phrases start a sentence; a run's name stays as it is."""
    return words[0].upper() + words[1:] if words.startswith("the ") else words


def _details(ours: str, theirs: str, found: Speedup) -> list[str]:
    """How the step was found, the same in seconds, and the end of both curves."""
    notes, reached = [], found.aligned
    if reached:
        notes.append(_interpolation(ours, reached))
        ratio, ours_took, theirs_took = found.times_seconds, reached.seconds, found.baseline.seconds
        if ratio and ours_took and theirs_took and not (reached.is_bound and ratio <= 1):
            spent = f"{duration(ours_took)} for {ours}, {duration(theirs_took)} for {theirs}"
            notes.append(f"In training time: {spent}, {times(ratio, 'less', 'more', reached.is_bound)}.")
    last = found.aligned_final, found.baseline_final
    ends = [f"{figure(row[DISTANCE])} at {count(row['step'])} steps" for row in last]
    notes.append(f"Last evaluations: {ours} {ends[0]}, {theirs} {ends[1]}.")
    return notes


def _interpolation(ours: str, reached: Reached) -> str:
    if reached.is_bound:
        return f"{_first_upper(ours)} had it at its first evaluation already, perhaps earlier."
    if reached.between[0] == reached.between[1]:
        return f"The evaluation of {ours} at {count(reached.step)} steps had exactly this distance."
    first, second = (count(step) for step in reached.between)
    return f"The step is linearly interpolated between the evaluations of {ours} at {first} and {second} steps."


def _other_differences(baseline: RunRecord, run: RunRecord, aside: tuple[str, ...] = ("alignments",)) -> list[str]:
    """Notes on what differs apart from the alignment."""
    notes = []
    others = [name for name, _ in config_differences([baseline, run]) if name.split(".")[0] not in aside]
    if others:
        notes.append(f"The configurations also differ in {listed(others)}: the comparison is not of alignment alone.")
    if baseline.data != run.data:
        notes.append("The runs were not trained on the same data (their data.json differ).")
    return notes


def _meaning(ours: str, theirs: str, run: RunRecord) -> str:
    """What was compared, where nothing but alignment differs; empty unless the alignment is to encoders."""
    if not all(parse_spec(str(item.get("target")))[0] in ENCODERS for item in run.alignments):
        return ""
    return (
        f"Both runs train the same network on the same images, in the same order, from the same start. While {ours} learns to remove "
        "noise, its inner layers are also asked to describe a picture as an image encoder that was trained before does; "
        f"{theirs} learns without. A lower distance means that samples look more like the training images."
    )


def _over_seeds(compared: Sequence[GroupSpeedup]) -> Verdict:
    """The group that had the baseline's final distance soonest, on the mean of its seeds."""
    whole = [(factors.mean, each) for each in compared if (factors := each.factors("steps"))]
    if whole:
        _, best = max(whole, key=lambda pair: pair[0])
    else:
        best = max(compared, key=lambda each: len(each.reached) / len(each.pairs))
    return Verdict(_sentence_over_seeds(best, len(compared)), _notes_over_seeds(best))


def _sentence_over_seeds(found: GroupSpeedup, num_compared: int) -> str:
    factors, num = found.factors("steps"), len(found.reached)
    rank = "fastest" if factors else "nearest"
    among = "" if num_compared == 1 else f", the {rank} of {num_compared} aligned configurations,"
    who = f"{found.aligned.label}{among}"
    what = f"the final {distance_name(found.pairs[0].protocol)} of {found.baseline.label}"
    if not num:
        return f"{who} did not reach {what} with any seed."
    if not factors:
        return f"{who} reached {what} in {num} of {len(found.pairs)} comparisons, so no mean speed-up is stated."
    steps = spread([pair.aligned.step for pair in found.pairs if pair.aligned])
    gain = times(factors.mean, "fewer", "more", found.is_bound)
    pairs = f"{len(found.pairs)} pairs of the same seed" if found.by_seed else f"all {len(found.pairs)} pairs"
    extent = f"{factor(factors.low)} to {factor(factors.high)}" if factors.num > 1 else "one pair"
    return f"{who} reached {what} after {count(steps.mean)} steps on average: {gain} ({pairs}: {extent})."


def _notes_over_seeds(found: GroupSpeedup) -> list[str]:
    notes = []
    if found.by_seed:
        notes.append("Each aligned run is compared with the baseline of its seed, which started from the same network.")
    else:
        notes.append("Seeds of baseline and aligned runs differ, so every run is compared with every baseline.")
    if len(found.baseline.runs) == 1:
        notes.append("There is one baseline: how much its distance moves with the seed was not measured.")
    if seconds := found.factors("seconds"):
        gain, ends = times(seconds.mean, "less", "more", found.is_bound), (factor(seconds.low), factor(seconds.high))
        notes.append(f"In training time: {gain} ({ends[0]} to {ends[1]}).")
    if found.is_bound:
        notes.append("Some run was there at its first evaluation already, perhaps earlier.")
    least = min(len(found.baseline.runs), len(found.aligned.runs))
    if least < FEW:
        notes.append(f"With {least} seed{'s' if least > 1 else ''} the spread itself is only roughly known.")
    return notes + _other_differences(found.baseline.runs[0], found.aligned.runs[0], aside=("alignments", "seed"))


def _without_comparison(groups: Sequence[Group]) -> Verdict:
    """The last distance of every group, and why nothing is compared."""
    measured = [
        (group, protocols[0]) for group in groups if (protocols := [p for r in group.runs for p in r.protocols])
    ]
    if not measured:
        trained = [f"{run.name} ({count(run.steps)} steps)" for group in groups for run in group.runs if run.steps]
        what = f"Trained: {listed(trained)}. " if trained else "No run has logged a step yet. "
        return Verdict(f"{what}There are no evaluations, so the page says nothing about the quality of samples.", [])
    ends = []
    for group, protocol in measured:
        last = [rows[-1] for run in group.runs if (rows := run.distances(protocol))]
        found = spread([row[DISTANCE] for row in last])
        extent = f" ({figure(found.low)} to {figure(found.high)})" if found.num > 1 else ""
        steps = listed([count(step) for step in sorted({row["step"] for row in last})])
        ends.append(f"{group.label}: {distance_name(protocol)} {figure(found.mean)}{extent} after {steps} steps")
    notes = []
    if sum(len(group.runs) for group in groups) > 1:
        if all(group.is_aligned for group in groups):
            notes.append("No run was trained without alignment, so no speed-up is stated.")
        elif not any(group.is_aligned for group in groups):
            notes.append("No run was trained with alignment, so no speed-up is stated.")
        else:
            notes.append(
                "The baseline and the aligned runs share no evaluation made in the same way, so no speed-up is stated."
            )
        if len({protocol for _, protocol in measured}) > 1:
            notes.append("These distances were made in different ways and do not compare with each other.")
    return Verdict("; ".join(ends) + ".", notes)
