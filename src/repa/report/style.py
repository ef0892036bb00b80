"""How the report shows things: the style of its pictures, and numbers and settings as text.

Each run has one colour and marker in all pictures. Figures are written as SVG and PNG.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa.base import imports
from repa.base.files import atomic_path
from repa.report.runs import Protocol, settings_of
from repa.report.speedups import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# after Okabe and Ito, for colour-blind eyes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # a second cue besides colour, also for grey print
DPI = 160
LINES = ("-", "--", "-.", ":")
TEXT, RULE = "#1b1b1d", "#c9c9ce"  # the page turns these two and COLOURS into variables of its colour scheme
ABOUT_EQUAL = 0.05  # ratios this close to 1 are called about the same
# Of an evaluation; what follows the first of a line is added where it was recorded.
HOW_MADE = (
    ("{num_samples:,.0f} samples", " with {labels} labels"),
    ("features of {features}", " (weights {feature_weights})", " in {features_precision}"),
    ("against {reference}", " (checksum {reference_sha256:.8})"),
    ("sampler {sampler}", ", {steps} steps"),
    ("{nfe} network evaluations (NFE) per sample",),
    ("{guidance}",),
    ("guided by a weaker network (checksum {weak_sha256:.8})",),
    ("guided by an image (checksum {guide_image_sha256:.8})",),
    ("decoded by {decoder}",),
    ("{weights} weights",),
    ("precision and recall in {neighbours}",),
)


def colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def line_style(style: int) -> str:
    return LINES[style % len(LINES)]


def main_line(run: int) -> dict[str, Any]:
    """The style of a run's main line."""
    return {"color": colour(run), "linewidth": 1.9, "marker": MARKERS[run % len(MARKERS)], "markersize": 5}


def legend_label(name: str) -> str:
    """A label for the legend: matplotlib omits labels that start with an underscore, so a space is prepended."""
    return f" {name}" if name.startswith("_") else name


def label_axes(axes: Axes, horizontal: str, vertical: str) -> None:
    """Labels and a quiet grid."""
    axes.set_xlabel(horizontal, color=TEXT)
    axes.set_ylabel(vertical, color=TEXT)
    axes.grid(color=RULE, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(color=RULE, labelcolor=TEXT, labelsize=9)


def draw_legend(axes: Axes, **settings: Any) -> None:
    """matplotlib's legend(**settings), in which a dollar of a run's name is a dollar."""
    for text in axes.legend(frameon=False, labelcolor=TEXT, **settings).get_texts():
        text.set_parse_math(False)


def new_figure(**settings: Any) -> Figure:
    """matplotlib's Figure(**settings); raises UserError if matplotlib is not installed."""
    return imports.need("matplotlib.figure", "A picture of a report").Figure(**settings)


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """The `<svg>` element, for a page whose CSS defines --rule, --run-0, --run-1, ... and the font of svg text.

    Args:
        figure: the figure; the same figure gives the same text.
        name: prefix of all ids inside; unique on the page.
        alt: the text alternative.
    """
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, in the font of the page. Without a date and with a fixed salt, the output is deterministic.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # A <style> would affect the entire page, and ids of several figures must be unique.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    # Colours become variables, which the page adapts to a dark scheme and to print.
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--run-{index})")
    text = text.replace(TEXT, "currentColor").replace("#000000", "currentColor").replace(RULE, "var(--rule)")
    opening = text[: text.index(">") + 1]
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box is not None  # matplotlib always writes one
    label = html.escape(alt, quote=True)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{text[len(opening) :]}'


def write_png(picture: Figure, out: str | Path) -> Path:
    """Write a PNG atomically."""
    with atomic_path(out) as temporary:
        picture.savefig(temporary, format="png", dpi=DPI)
    return Path(out)


def count(value: float) -> str:
    """1382 -> '1,382'."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """130300000 -> '130 M'; three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def short_number(value: float) -> str:
    """A measured value with three or four significant digits: 240.1, 10.75, 0.0123."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def with_deviation(found: Spread, words: Callable[[float], str]) -> str:
    """'8.51 ± 0.54', with the decimals of the mean; only the value for one run."""
    mean = words(found.mean)
    if found.deviation is None:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {found.deviation:,.{decimals}f}"


def how_made(protocol: Protocol) -> str:
    """The protocol of a Fréchet distance as text: features, reference, samples and labels, sampler, NFE, weights."""
    given = settings_of(protocol)
    if "guidance" in given:
        given["guidance"] = _guidance(given["guidance"])
    if given.get("weights") == "ema":
        given["weights"] = "EMA"

    def filled(form: str) -> str:
        try:
            return form.format_map(given)
        except KeyError:  # not recorded
            return ""

    parts = [filled(first) and "".join(map(filled, (first, *more))) for first, *more in HOW_MADE]
    return "; ".join(filter(None, parts)) or "how it was made was not recorded"


def _guidance(given: Any) -> str:
    """'no guidance', 'guidance internal:scale=1.4 then cfg:scale=1.35,high=0.7'."""
    if given == "off":
        return "no guidance"
    return f"guidance {' then '.join(map(str, given))}" if isinstance(given, list) else f"guidance {given}"


def times(ratio: float, fewer: str, more: str, at_least: bool = False) -> str:
    """1.92 -> '1.9 times fewer'; 0.5 -> '2.0 times more'; 1.02 -> 'about the same'."""
    if at_least and ratio > 1:
        return f"at least {factor(ratio)} times {fewer}"
    if abs(ratio - 1) < ABOUT_EQUAL:
        return "about the same"
    return f"{factor(ratio)} times {fewer}" if ratio > 1 else f"{factor(1 / ratio)} times {more}"


def factor(ratio: float) -> str:
    """1.92 -> '1.9', 17.5 -> '18'."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"
