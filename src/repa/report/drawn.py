"""The figures of the page, as inline SVG with their captions."""

from collections.abc import Sequence
from typing import NamedTuple

from repa.report.analysis_figures import depth_figure
from repa.report.analysis_results import Analysis, alt, caption
from repa.report.captions import distance_alt, distance_caption, learning_alt, training_alt, training_caption
from repa.report.curves import alignment_axis, curve_figure
from repa.report.learning import QUANTITIES
from repa.report.runs import Protocol, RunRecord, is_number
from repa.report.speedups import grouped
from repa.report.svg import inline_svg


class Curve(NamedTuple):
    """An inline SVG, its caption and the width in inches that it was drawn for."""

    svg: str
    caption: str
    width: float = 0.0


def distance_curves(records: Sequence[RunRecord], protocol: Protocol, number: int) -> list[Curve]:
    """Against steps, seconds and images, as far as these are known."""
    with_seeds = len(grouped(records)) < len(records)
    curves = []
    for against in ("step", "seconds", "images"):
        if any(is_number(row.get(against)) for run in records for row in run.distances(protocol)):
            picture = curve_figure(records, "frechet_distance", against=against, protocol=protocol)
            svg = inline_svg(picture, f"distance-{number}-{against}", distance_alt(records, protocol, against))
            curves.append(Curve(svg, distance_caption(protocol, against, with_seeds)))
    return curves


def loss_curve(records: Sequence[RunRecord]) -> Curve:
    svg = inline_svg(curve_figure(records, "denoising"), "denoising", training_alt(records, "denoising"))
    return Curve(svg, training_caption(records, "Denoising loss, lower is better; its first values may be cut off."))


def alignment_curve(records: Sequence[RunRecord]) -> Curve:
    svg = inline_svg(curve_figure(records, "alignment"), "alignment", training_alt(records, "alignment"))
    words = f"Alignment ({alignment_axis(records)}) of projected hidden tokens and the encoder’s, higher is closer."
    return Curve(svg, training_caption(records, words))


def learning_curve(records: Sequence[RunRecord], key: str) -> Curve:
    """A key of `QUANTITIES` against steps."""
    quantity = QUANTITIES[key]
    svg = inline_svg(curve_figure(records, key), key, learning_alt(records, key, quantity))
    words = f"{quantity.label[0].upper()}{quantity.label[1:]}."
    return Curve(svg, training_caption(records, words) if quantity.is_noisy else words)


def analysis_curve(analysis: Analysis, number: int) -> Curve:
    """Curves over depth, heat maps over noise levels, the best block over training."""
    picture = depth_figure(analysis.rows, analysis.value, analysis.label)
    svg = inline_svg(picture, f"analysis-{number}", alt(analysis))
    return Curve(svg, caption(analysis), float(picture.get_figwidth()))
