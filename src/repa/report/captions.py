"""What stands under a curve, and what a reader who does not see it is told."""

from collections.abc import Sequence

from repa.report.curves import smoothing_window
from repa.report.learning import Quantity
from repa.report.runs import DISTANCE, Protocol, RunRecord, distance_name
from repa.report.speedups import grouped
from repa.report.summary import summary_rows
from repa.report.text import count, figure, how_made


def distance_caption(protocol: Protocol, against: str, with_seeds: bool = False) -> str:
    if against == "seconds":
        return "The same against training time as the runs logged it: what a step costs is in it."
    if against == "images":
        return "The same against training images, repetitions counted: steps times batch size."
    seeds = " Thin: each seed; strong: their mean at the steps that all have." if with_seeds else ""
    return (
        f"{distance_name(protocol)}, lower is better: {how_made(protocol)}.{seeds} Straight between evaluations; a dotted "
        "level is the baseline’s last value, a ring where an aligned run first had it. First values far above the rest "
        "may be cut off."
    )


def distance_alt(records: Sequence[RunRecord], protocol: Protocol, against: str) -> str:
    parts = []
    for run in records:
        if rows := run.distances(protocol):
            first, last = rows[0], rows[-1]
            parts.append(
                f"{run.name} goes from {figure(first[DISTANCE])} at {count(first['step'])} steps "
                f"to {figure(last[DISTANCE])} at {count(last['step'])} steps"
            )
    axis = {"step": "training steps", "seconds": "time", "images": "training images"}[against]
    return f"{distance_name(protocol)} against {axis}: {'; '.join(parts)}."


def training_caption(records: Sequence[RunRecord], what: str) -> str:
    window = max(smoothing_window(len(run.train)) for run in records)
    mean = f"centred mean over up to {window} rows"
    if len(grouped(records)) < len(records):
        return f"{what} A line a seed: {mean if window > 1 else 'as logged'}."
    return f"{what} Faint: as logged; strong: {mean}." if window > 1 else f"{what} As logged."


def learning_alt(records: Sequence[RunRecord], key: str, quantity: Quantity) -> str:
    ends = [(run.name, run.series(key)[1]) for run in records]
    parts = [
        f"{name} from {figure(y[0] * quantity.scale)} to {figure(y[-1] * quantity.scale)}" for name, y in ends if y
    ]
    return f"{quantity.label} against training steps: {'; '.join(parts)}."


def training_alt(records: Sequence[RunRecord], kind: str) -> str:
    parts = []
    for row in summary_rows(records):
        final = row["alignment"] if kind == "alignment" else {"": row["denoising"]}
        parts += [f"{row['name']} {name} ends at {value:.3f}" for name, value in final.items() if value is not None]
    return f"{kind.capitalize()} against training steps: {'; '.join(parts)}."
