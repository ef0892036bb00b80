"""The headline of the page, computed from complete curves, and remarks for a careful reader.

A single early evaluation supports no claim: the headline states the last distances at equal steps, the number of compared
steps at which the aligned run is lower, and a factor only if the curve supports it (`Speedup.is_supported`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from repa.base.errors import listed
from repa.base.registry import parse_spec
from repa.base.reporting import duration
from repa.encoders import ENCODERS
from repa.report.runs import DISTANCE, RunRecord, distance_name
from repa.report.speedups import Reached, SeedGroup, SeedSpeedup, Speedup, group_seeds, speedups_of_groups, spread
from repa.report.style import count, factor, short_number, times, with_deviation
from repa.report.summary import config_differences

EVALUATIONS = 5  # smallest number that makes a curve
FEW = 5  # seeds: with fewer, the standard deviation is only a rough estimate


class Verdict(NamedTuple):
    """The headline and the remarks below it."""

    sentence: str
    notes: list[str]
    meaning: str = ""
    """Explanation of the comparison, for a reader who does not know the method."""


def verdict(records: Sequence[RunRecord]) -> Verdict:
    """The conclusion that the runs support, and no more."""
    groups = group_seeds(records)
    compared = speedups_of_groups(groups)
    if not compared:
        return _verdict_without_pairs(groups)
    # The headline is on the configuration with the lowest last distance, because a factor may depend on one early evaluation.
    lowest = min(compared, key=_final_ratio)
    ours, theirs = _names_of_both(lowest, records)
    single = len(lowest.pairs) == 1
    sentence = _sentence_of_pair(lowest.pairs[0], ours, theirs) if single else _sentence_over_seeds(lowest)
    if len(compared) > 1:
        sentence = f"Of {len(compared)} aligned configurations {lowest.aligned.name} ends lowest. {sentence}"
    differences = _other_differences(lowest)
    notes = [*_notes_of_pair(ours, theirs, lowest.pairs[0])] if single else _notes_over_seeds(lowest)
    for other in compared:
        if other is not lowest:
            others = other.aligned.name, theirs
            notes.append(
                _sentence_of_pair(other.pairs[0], *others) if len(other.pairs) == 1 else _sentence_over_seeds(other)
            )
    if single:
        notes.append(
            "One seed each: the spread between seeds was not measured, so a difference may "
            "be chance. Train more with `repa train --seed`; runs that differ only in the seed form one group."
        )
    notes += differences
    return Verdict(sentence, notes, "" if differences else _explanation(ours, theirs, lowest.aligned.runs[0]))


def _final_ratio(speedup: SeedSpeedup) -> float:
    """Mean ratio of the aligned distance to the baseline's at the last common step; infinite without one."""
    ends = [(pair.overlap.aligned[-1], pair.overlap.baseline[-1]) for pair in speedup.pairs if pair.overlap.steps]
    theirs = sum(b for _, b in ends)
    return sum(a for a, _ in ends) / theirs if theirs else float("inf")


def _names_of_both(speedup: SeedSpeedup, records: Sequence[RunRecord]) -> tuple[str, str]:
    """Names of the two runs in sentences: their roles if each role has only one run, otherwise their names."""
    num_aligned = sum(run.is_aligned for run in records)
    ours = "the aligned run" if num_aligned == 1 else speedup.aligned.label
    return ours, "the baseline" if len(records) == num_aligned + 1 else speedup.baseline.label


def _sentence_of_pair(speedup: Speedup, ours: str, theirs: str) -> str:
    """Comparison of the complete curves, and the factor if they support one."""
    what, overlap = distance_name(speedup.protocol), speedup.overlap
    if not overlap.steps:
        ours_last, theirs_last = (_distance_at(row) for row in (speedup.aligned_final, speedup.baseline_final))
        return (
            f"{_first_upper(ours)} and {theirs} were not evaluated over the same steps, so they are not compared: "
            f"{what} {ours_last} and {theirs_last}."
        )
    num, ends = len(overlap.steps), f"{short_number(overlap.aligned[-1])} against {short_number(overlap.baseline[-1])}"
    end = f"{count(overlap.steps[-1])} steps"
    start = f"With one seed each, {ours}’s {what}"
    higher = "lower" if overlap.difference < 0 else "higher" if overlap.difference > 0 else "no lower"
    if num == 1:
        sentence = (
            f"{start} is {higher} than {theirs}’s in the only evaluation to compare, {ends} at {end}: one evaluation shows "
            "no curve and no speed-up."
        )
    elif overlap.num_lower == num or overlap.num_higher == num:
        sentence = f"{start} is {higher} than {theirs}’s at all {num} compared steps: {ends} at {end}."
    elif overlap.crosses:
        sentence = (
            f"With one seed each, the curves cross: {ours}’s {what} is lower than {theirs}’s at {overlap.num_lower} of {num} "
            f"compared steps and ends {higher}, {ends} at {end}."
        )
    else:
        sentence = f"{start} is lower than {theirs}’s at {overlap.num_lower} of {num} compared steps: {ends} at {end}."
    return f"{sentence} {_speedup_sentence(speedup, theirs)}".strip()


def _speedup_sentence(speedup: Speedup, theirs: str) -> str:
    """'It reached the baseline's final distance in 2.4 times fewer steps (424 instead of 1,000).'; empty without support."""
    there, ratio = speedup.aligned, speedup.times_steps
    if there is None or ratio is None or not speedup.is_supported:
        return ""
    first = speedup.baseline.step < speedup.baseline_final["step"]
    instead = (
        f"the {count(speedup.baseline.step)} after which {theirs} first had it"
        if first
        else count(speedup.baseline.step)
    )
    gain = times(ratio, "fewer", "more", there.is_bound)
    gain = f"in {gain} steps" if gain[0].isdigit() or there.is_bound else f"in {gain} number of steps"
    least = "at most " if there.is_bound else ""
    return f"It reached {theirs}’s final value {gain} ({least}{count(there.step)} instead of {instead})."


def _advice_to_evaluate(speedup: Speedup) -> str:
    """How to get a curve, for runs that were evaluated only once or too late."""
    every = max(1, int(speedup.baseline_final["step"]) // EVALUATIONS)
    options = f"--preview.num-scored 500 --preview.score-every {every}"
    return f"For more evaluations train both again into new folders with `{options}`."


def _distance_at(row: dict) -> str:
    return f"{short_number(row[DISTANCE])} at {count(row['step'])} steps"


def _first_upper(words: str) -> str:
    """Capitalise our own phrases at the start of a sentence; the name of a run stays unchanged."""
    return words[0].upper() + words[1:] if words.startswith("the ") else words


def _notes_of_pair(ours: str, theirs: str, speedup: Speedup) -> list[str]:
    """Details beyond the headline: how the step was determined, the same in seconds, the lowest and the last evaluations."""
    notes, reached = [], speedup.aligned
    target = f"{theirs}’s final distance ({_distance_at(speedup.baseline_final)})"
    if reached is None:
        notes.append(
            f"{_first_upper(ours)} did not reach {target}: its lowest is {_distance_at(speedup.aligned_best)}."
        )
    elif speedup.is_too_coarse or not speedup.overlap.steps:
        if len(speedup.overlap.steps) > 1:  # with one or none, the headline says it
            notes.append(
                f"{_first_upper(ours)} had {target} at its first evaluation already, and {theirs} no later, so no speed-up is "
                f"stated. {_advice_to_evaluate(speedup)}"
            )
    elif not speedup.is_supported:
        why = "was above it again later" if not reached.stays else "does not end lower at equal steps"
        at = f"at {count(reached.step)} steps"
        notes.append(f"{_first_upper(ours)} first had {target} {at}, but {why}: no speed-up is stated.")
    else:
        notes.append(_interpolation_note(ours, reached))
        ratio, ours_took, theirs_took = speedup.times_seconds, reached.seconds, speedup.baseline.seconds
        if ratio and ours_took and theirs_took and not (reached.is_bound and ratio <= 1):
            spent = f"{duration(ours_took)} for {ours}, {duration(theirs_took)} for {theirs}"
            notes.append(f"In training time: {spent}, {times(ratio, 'less', 'more', reached.is_bound)}.")
    if speedup.aligned_final["step"] != speedup.baseline_final["step"]:
        last = _distance_at(speedup.aligned_final), _distance_at(speedup.baseline_final)
        notes.append(f"Last evaluations: {ours} {last[0]}, {theirs} {last[1]}.")
    if len(speedup.overlap.steps) <= 1:
        notes.append(_advice_to_evaluate(speedup))
    return notes


def _interpolation_note(ours: str, reached: Reached) -> str:
    if reached.is_bound:
        return f"{_first_upper(ours)} had reached it by its first evaluation, perhaps earlier."
    if reached.between[0] == reached.between[1]:
        return f"The evaluation of {ours} at {count(reached.step)} steps had exactly this distance."
    first, second = (count(step) for step in reached.between)
    return f"The step is linearly interpolated between the evaluations of {ours} at {first} and {second} steps."


def _other_differences(speedup: SeedSpeedup) -> list[str]:
    """Notes on differences other than the alignment, and other than the seed if seeds are compared."""
    baseline, run = speedup.baseline.runs[0], speedup.aligned.runs[0]
    aside = ("alignments",) if len(speedup.pairs) == 1 else ("alignments", "seed")
    notes = []
    others = [name for name, _ in config_differences([baseline, run]) if name.split(".")[0] not in aside]
    if others:
        notes.append(
            f"The configurations also differ in {listed(others, 'and')}, so alignment is not the only difference."
        )
    if baseline.data != run.data:
        notes.append("The runs were not trained on the same data (their data.json differ).")
    return notes


def _explanation(ours: str, theirs: str, run: RunRecord) -> str:
    """Explanation of the comparison if only the alignment differs; empty unless all targets are encoders."""
    if not all(parse_spec(str(item.get("target")))[0] in ENCODERS for item in run.alignments):
        return ""
    return (
        f"Both runs train the same network on the same images, in the same order, from the same initial weights. While {ours} "
        "learns to remove noise, its inner layers are also trained to predict what a pretrained image encoder says about the "
        f"picture; {theirs} learns without that. A lower distance means that samples look more like the training images."
    )


def _sentence_over_seeds(speedup: SeedSpeedup) -> str:
    """The last distances over seeds, the number of pairs in which the aligned run is lower, and the mean factor if all pairs have one."""
    pairs = [pair for pair in speedup.pairs if pair.overlap.steps]
    what, num = distance_name(speedup.pairs[0].protocol), len(speedup.pairs)
    # A mean over only some pairs would be biased.
    if len(pairs) < num:
        return f"{speedup.aligned.label} and {speedup.baseline.label} were not evaluated over the same steps: nothing is compared."
    # A run may be in several pairs, but its last distance counts once.
    last = ([pair.overlap.aligned[-1] for pair in pairs], [pair.overlap.baseline[-1] for pair in pairs])
    ours, theirs = (spread(values if speedup.by_seed else sorted(set(values))) for values in last)
    ends = sorted({pair.overlap.steps[-1] for pair in pairs})
    where = f"at {count(ends[0])} steps" if len(ends) == 1 else "at the last step that both runs of a pair have"
    lower, crossing = sum(pair.overlap.difference < 0 for pair in pairs), sum(pair.overlap.crosses for pair in pairs)
    of_pairs = f"{num} pairs of the same seed" if speedup.by_seed else f"{num} pairs"
    share = f"all {of_pairs}" if lower == num else f"{lower} of {of_pairs}" if lower else f"none of {of_pairs}"
    over = (
        f"{len(speedup.aligned.runs)} seeds" if len(speedup.aligned.runs) > 1 else f"{len(speedup.baseline.runs)} seeds"
    )
    sentence = (
        f"Over {over}, {speedup.aligned.name} ends at a {what} of {with_deviation(ours, short_number)} against "
        f"{with_deviation(theirs, short_number)} for {speedup.baseline.name} ({where}), lower in {share}"
    )
    sentence += "." if lower in (0, num) else ": the seeds disagree."
    if crossing:
        sentence += (
            f" The curves cross in {crossing} of {num}." if crossing < num else " The curves cross in every pair."
        )
    factors = speedup.factors("steps")
    if factors is not None and not (speedup.is_bound and factors.mean <= 1):
        gain = times(factors.mean, "fewer", "more", speedup.is_bound)
        extent = f" ({factor(factors.low)} to {factor(factors.high)})"
        sentence += f" Steps to the baseline’s final value: {gain}{extent}."
    return sentence


def _notes_over_seeds(speedup: SeedSpeedup) -> list[str]:
    notes = []
    if speedup.by_seed:
        notes.append("Each aligned run is compared with the baseline of its seed, which started from the same network.")
    else:
        notes.append("Seeds of baseline and aligned runs differ, so every run is compared with every baseline.")
    if len(speedup.baseline.runs) == 1:
        notes.append("There is one baseline, so the spread of its distance between seeds was not measured.")
    counting = [pair for pair in speedup.pairs if pair.is_supported]
    if coarse := [pair for pair in speedup.pairs if pair.is_too_coarse]:
        notes.append(
            f"{len(coarse)} of {len(speedup.pairs)} aligned runs had the baseline’s final distance at the first evaluation, and the "
            f"baseline no later, so no mean speed-up is stated. {_advice_to_evaluate(coarse[0])}"
        )
    elif len(counting) < len(speedup.pairs):
        notes.append(
            f"{len(counting)} of {len(speedup.pairs)} aligned runs reached the baseline’s final distance, stayed at or below it "
            "and end lower, so no mean speed-up is stated."
        )
    elif seconds := speedup.factors("seconds"):
        gain, ends = times(seconds.mean, "less", "more", speedup.is_bound), (factor(seconds.low), factor(seconds.high))
        notes.append(f"In training time: {gain} ({ends[0]} to {ends[1]}).")
    if speedup.is_bound:
        notes.append("Some run had reached it by its first evaluation, perhaps earlier.")
    least = min(len(speedup.baseline.runs), len(speedup.aligned.runs))
    if least < FEW:
        notes.append(f"With {least} seed{'s' if least > 1 else ''} the spread itself is only roughly known.")
    return notes


def _verdict_without_pairs(groups: Sequence[SeedGroup]) -> Verdict:
    """The last distance of every group, and the reason why there is no comparison."""
    measured = [
        (group, protocols[0]) for group in groups if (protocols := [p for r in group.runs for p in r.protocols])
    ]
    if not measured:
        trained = [f"{run.name} ({count(run.steps)} steps)" for group in groups for run in group.runs if run.steps]
        what = f"Trained: {listed(trained, 'and')}. " if trained else "No run has logged a step yet. "
        return Verdict(f"{what}There are no evaluations, so the report cannot judge the quality of samples.", [])
    ends = []
    for group, protocol in measured:
        last = [rows[-1] for run in group.runs if (rows := run.distances(protocol))]
        distances = spread([row[DISTANCE] for row in last])
        extent = f" ({short_number(distances.low)} to {short_number(distances.high)})" if distances.num > 1 else ""
        steps = listed([count(step) for step in sorted({row["step"] for row in last})], "and")
        ends.append(
            f"{group.label}: {distance_name(protocol)} {short_number(distances.mean)}{extent} after {steps} steps"
        )
    notes = []
    if sum(len(group.runs) for group in groups) > 1:
        if all(group.is_aligned for group in groups):
            notes.append("No run was trained without alignment, so no speed-up is stated.")
        elif not any(group.is_aligned for group in groups):
            notes.append("No run was trained with alignment, so no speed-up is stated.")
        else:
            notes.append(
                "The baseline and the aligned runs share no evaluation with the same protocol, so no speed-up is stated. Evaluate "
                "each with the same options, as in `repa evaluate RUN --reference DATA --num-images 500 --features tiny-classifier`."
            )
        if len({protocol for _, protocol in measured}) > 1:
            notes.append("These distances have different protocols and are not comparable.")
    return Verdict("; ".join(ends) + ".", notes)
