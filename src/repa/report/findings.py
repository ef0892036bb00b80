"""The one sentence on top of the page, computed from the evaluations, and what a careful reader must know beside it."""

from collections.abc import Sequence

from repa.base.registry import parse_spec
from repa.encoders import ENCODERS
from repa.report.configs import config_differences
from repa.report.runs import DISTANCE, RunRecord, distance_name
from repa.report.seeds import grouped
from repa.report.seeds_findings import verdict_over_seeds
from repa.report.summary import Reached, Speedup, baseline_of, speedup
from repa.report.text import Verdict, count, duration, figure, listed, times


def verdict(records: Sequence[RunRecord]) -> Verdict:
    """What the runs show, never more than they show."""
    groups = grouped(records)
    if len(groups) < len(records):
        return verdict_over_seeds(groups)
    baseline, aligned = baseline_of(records), [run for run in records if run.is_aligned]
    pairs = [(run, found) for run in aligned if (found := speedup(baseline, run))] if baseline is not None else []
    if not pairs:
        return _without_comparison(records, baseline, aligned)
    reached = [(run, found) for run, found in pairs if found.aligned]
    if reached:
        run, found = min(reached, key=lambda pair: pair[1].aligned.step)
    else:
        run, found = min(pairs, key=lambda pair: pair[1].aligned_best[DISTANCE])
    ours = "the aligned run" if len(aligned) == 1 else run.name
    theirs = "the baseline" if len(records) == len(aligned) + 1 else baseline.name
    sentence = (_reached if reached else _not_reached)(ours, theirs, found, len(pairs))
    notes = [*_details(ours, theirs, found), *_fairness(baseline, run)]
    return Verdict(sentence, notes, _meaning(ours, theirs, baseline, run))


def _reached(ours: str, theirs: str, found: Speedup, num_compared: int) -> str:
    who = _first_upper(ours) if num_compared == 1 else f"{ours}, the fastest of {num_compared} aligned runs,"
    end, step = found.baseline_final["step"], count(found.aligned.step)
    when = f"by its first evaluation, at {step} steps" if found.aligned.is_bound else f"after {step} steps"
    ratio = found.times_steps
    if ratio is None or (found.aligned.is_bound and ratio <= 1):  # a bound that says nothing
        gain = ""
    else:
        gain = f": {times(ratio, 'fewer', 'more', found.aligned.is_bound)}"
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
        ratio = found.times_seconds
        if ratio is not None and not (reached.is_bound and ratio <= 1):
            spent = f"{duration(reached.seconds)} for {ours}, {duration(found.baseline.seconds)} for {theirs}"
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


def _other_differences(baseline: RunRecord, run: RunRecord) -> list[str]:
    """Settings in which the two differ, but for those of the alignment."""
    return [name for name, _ in config_differences([baseline, run]) if name.split(".")[0] != "alignments"]


def _fairness(baseline: RunRecord, run: RunRecord) -> list[str]:
    """What else differed, and what one run each cannot say."""
    notes = []
    if others := _other_differences(baseline, run):
        notes.append(
            f"The two configurations also differ in {listed(others)}: the comparison is not of alignment alone."
        )
    if baseline.data != run.data:
        notes.append("The two runs were not trained on the same data (their data.json differ).")
    notes.append(
        "One run each: how much these numbers would move with another seed was not measured, and a Fréchet distance "
        "compares only with distances made in the same way."
    )
    return notes


def _meaning(ours: str, theirs: str, baseline: RunRecord, run: RunRecord) -> str:
    """What was compared; nothing where more than alignment to encoders differs."""
    to_encoders = all(parse_spec(str(item.get("target")))[0] in ENCODERS for item in run.alignments)
    if not to_encoders or baseline.data != run.data or _other_differences(baseline, run):
        return ""
    return (
        f"Both runs train the same network on the same images, in the same order, from the same start. While {ours} learns to remove "
        "noise, its inner layers are also asked to describe a picture as an image encoder that was trained before does; "
        f"{theirs} learns without. A lower distance means that samples look more like the training images."
    )


def _without_comparison(records: Sequence[RunRecord], baseline: RunRecord | None, aligned: list[RunRecord]) -> Verdict:
    evaluated = [run for run in records if run.protocols]
    if not evaluated:
        trained = [f"{run.name} ({count(run.steps)} steps)" for run in records if run.steps]
        what = f"Trained: {listed(trained)}. " if trained else "No run has logged a step yet. "
        return Verdict(f"{what}There are no evaluations, so nothing can be said about the quality of samples.", [])
    ends = []
    for run in evaluated:
        last = run.distances(run.protocols[0])[-1]
        ends.append(
            f"{run.name}: {distance_name(run.protocols[0])} {figure(last[DISTANCE])} after {count(last['step'])} steps"
        )
    notes = []
    if len(records) > 1:
        if baseline is None:
            notes.append("No run was trained without alignment, so no speed-up is stated.")
        elif not aligned:
            notes.append("No run was trained with alignment, so no speed-up is stated.")
        else:
            notes.append(
                "The baseline and the aligned runs share no evaluation made in the same way, so no speed-up is stated."
            )
        if len({run.protocols[0] for run in evaluated}) > 1:
            notes.append("These distances were made in different ways and do not compare with each other.")
    return Verdict("; ".join(ends) + ".", notes)
