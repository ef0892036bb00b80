"""The figures of the page as inline SVG: each with its caption, and with a description for a reader who cannot see it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from repa.report.analyses import Analysis, depth_figure
from repa.report.curves import QUANTITIES, alignment_axis, curve_figure, smoothing_window
from repa.report.runs import DISTANCE, Protocol, RunRecord, distance_name, is_number
from repa.report.speedups import grouped
from repa.report.style import inline_svg
from repa.report.summary import summary_rows
from repa.report.text import count, figure, how_made


class Curve(NamedTuple):
    """An inline SVG, its caption and the width in inches that it was drawn for."""

    svg: str
    caption: str
    width: float = 0.0


def curves(records: Sequence[RunRecord]) -> list[Curve]:
    """The distances first (once per way they were made), then the losses; what nobody logged has no curve."""
    found = []
    protocols = list(dict.fromkeys(p for run in records for p in run.protocols))
    for number, protocol in enumerate(protocols):
        rows = [row for run in records for row in run.distances(protocol)]
        if len({row["step"] for row in rows}) > 1:  # a single step is a table's, no curve
            found += [
                _distance_curve(records, protocol, number, against)
                for against in ("step", "seconds", "images")
                if any(is_number(row.get(against)) for row in rows)
            ]
    if any(run.series("denoising")[0] for run in records):
        words = "Denoising loss, lower is better; its first values may be cut off."
        found.append(_loss_curve(records, "denoising", words))
    if any(run.alignment_names for run in records):
        axis = alignment_axis(records)
        words = f"Alignment ({axis}) of projected hidden tokens and the encoder’s, higher is closer."
        found.append(_loss_curve(records, "alignment", words))
    return found


def learning_curve(records: Sequence[RunRecord], key: str) -> Curve:
    """A key of `QUANTITIES` against steps."""
    quantity = QUANTITIES[key]
    ends = [(run.name, y) for run in records if (y := run.series(key)[1])]
    parts = [f"{name} from {figure(y[0] * quantity.scale)} to {figure(y[-1] * quantity.scale)}" for name, y in ends]
    alt = f"{quantity.label} against training steps: {'; '.join(parts)}."
    words = f"{_capital(quantity.label)}."
    caption = _smoothed(records, words) if quantity.is_noisy else words
    return Curve(inline_svg(curve_figure(records, key), key, alt), caption)


def analysis_curve(analysis: Analysis, number: int) -> Curve:
    """Curves over depth, heat maps over noise levels, the best block over training."""
    picture = depth_figure(analysis.rows, analysis.value, analysis.label)
    parts = [
        f"{row['run']} at {count(row['step'])} steps is highest at block {row['depth']}, t = {row['t']:g}, with {row[analysis.value]:.3f}"
        for row in analysis.best
    ]
    svg = inline_svg(picture, f"analysis-{number}", f"{analysis.label} over depth: {'; '.join(parts)}.")
    return Curve(svg, _analysis_caption(analysis), float(picture.get_figwidth()))


def _distance_curve(records: Sequence[RunRecord], protocol: Protocol, number: int, against: str) -> Curve:
    picture = curve_figure(records, DISTANCE, against=against, protocol=protocol)
    ends = [(run.name, rows[0], rows[-1]) for run in records if (rows := run.distances(protocol))]
    parts = [
        f"{name} goes from {figure(first[DISTANCE])} at {count(first['step'])} steps "
        f"to {figure(last[DISTANCE])} at {count(last['step'])} steps"
        for name, first, last in ends
    ]
    axis = {"step": "training steps", "seconds": "time", "images": "training images"}[against]
    alt = f"{distance_name(protocol)} against {axis}: {'; '.join(parts)}."
    has_seeds = len(grouped(records)) < len(records)
    seeds = " Thin: each seed; strong: their mean at the steps that all have." if has_seeds else ""
    caption = {
        "step": f"{distance_name(protocol)}, lower is better: {how_made(protocol)}.{seeds} Lines are straight "
        "between evaluations. A dotted level is the baseline’s last value, a ring marks where an aligned run first reached "
        "it. First values far above the rest may be cut off.",
        "seconds": "The same against training time as the runs logged it: what a step costs is in it.",
        "images": "The same against training images, repetitions counted: steps times batch size.",
    }
    return Curve(inline_svg(picture, f"distance-{number}-{against}", alt), caption[against])


def _loss_curve(records: Sequence[RunRecord], kind: str, words: str) -> Curve:
    """kind: "denoising" or "alignment"."""
    parts = []
    for row in summary_rows(records):
        final = row["alignment"] if kind == "alignment" else {"": row["denoising"]}
        parts += [f"{row['name']} {name} ends at {value:.3f}" for name, value in final.items() if value is not None]
    alt = f"{_capital(kind)} against training steps: {'; '.join(parts)}."
    return Curve(inline_svg(curve_figure(records, kind), kind, alt), _smoothed(records, words))


def _smoothed(records: Sequence[RunRecord], what: str) -> str:
    """The caption of a curve that is smoothed."""
    window = max(smoothing_window(len(run.train)) for run in records)
    mean = f"centred mean over up to {window} rows"
    if len(grouped(records)) < len(records):
        return f"{what} A line a seed: {mean if window > 1 else 'as logged'}."
    return f"{what} Faint: as logged; strong: {mean}." if window > 1 else f"{what} As logged."


def _analysis_caption(analysis: Analysis) -> str:
    given = analysis.settings
    parts = []
    if given.get("num_images"):
        parts.append(f"{count(given['num_images'])} images")
    elif "num_images" in given:
        parts.append("all images")
    data = f"of {Path(str(given.get('data'))).name}"
    if analysis.kind == "probe":
        tested = Path(given["val"]).name if given.get("val") else "a fifth of them"
        parts.append(f"{data}, tested on {tested}")
        parts.append(f"{given.get('epochs')} epochs; the best of several learning rates, where several were tried")
    else:
        parts.append(data)
    if analysis.kind == "cknna":
        parts.append(f"k = {given.get('neighbours')}, the {given.get('variant')} variant")
    return f"{_capital(analysis.label)} of each block: {'; '.join(parts)}. t = 0 is data."


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
