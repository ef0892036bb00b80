"""What stands under a curve, and what a reader who does not see it is told."""

from collections.abc import Sequence

from repa.report.curves import smoothing_window
from repa.report.records import Protocol, RunRecord
from repa.report.summary import summary_rows
from repa.report.text import count, figure, how_made


def distance_caption(protocol: Protocol, against: str) -> str:
    if against == "seconds":
        return "The same against training time as the runs logged it: what a step costs is in it."
    return (
        f"Fréchet distance, lower is better: {how_made(protocol)}. Straight between evaluations; the dotted level is "
        "the baseline’s last value, the ring where an aligned run first had it. First values far above the rest may be "
        "cut off."
    )


def distance_alt(records: Sequence[RunRecord], protocol: Protocol, against: str) -> str:
    parts = []
    for run in records:
        if rows := run.distances(protocol):
            first, last = rows[0], rows[-1]
            parts.append(
                f"{run.name} goes from {figure(first['frechet_distance'])} at {count(first['step'])} steps "
                f"to {figure(last['frechet_distance'])} at {count(last['step'])} steps"
            )
    return f"Fréchet distance against {'training steps' if against == 'step' else 'time'}: {'; '.join(parts)}."


def training_caption(records: Sequence[RunRecord], what: str) -> str:
    window = max(smoothing_window(len(run.train)) for run in records)
    return f"{what} Faint: as logged; strong: centred mean over up to {window} rows."


def training_alt(records: Sequence[RunRecord], kind: str) -> str:
    parts = []
    for row in summary_rows(records):
        final = row["alignment"] if kind == "alignment" else {"": row["denoising"]}
        parts += [f"{row['name']} {name} ends at {value:.3f}" for name, value in final.items() if value is not None]
    return f"{kind.capitalize()} against training steps: {'; '.join(parts)}."
