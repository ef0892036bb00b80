"""Style of the report's pictures, with one colour and marker per run in all of them; output as SVG and PNG."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa.base import imports
from repa.base.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# after Okabe and Ito, for colour-blind eyes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b07d00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # a second cue besides colour, also for grey print
DPI = 160
LINES = ("-", "--", "-.", ":")
TEXT, RULE = "#1b1b1d", "#c9c9ce"  # the page turns these two and COLOURS into variables of its colour scheme


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
