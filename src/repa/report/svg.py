"""A matplotlib figure as inline SVG that follows the page's colour scheme and shares no identifier with another one."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from repa.report.style import COLOURS, RULE, TEXT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def inline_svg(figure: Figure, name: str, alt: str) -> str:
    """The `<svg>` element, for a page whose CSS defines --rule, --run-0, --run-1, ... and the font of svg text.

    Args:
        figure: what to draw; the same figure gives the same text.
        name: prefix of every id inside; unique on the page.
        alt: what a reader who does not see it is told.
    """
    import matplotlib

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL
    )  # a style would rule the page
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--run-{index})")
    text = text.replace(TEXT, "currentColor").replace("#000000", "currentColor").replace(RULE, "var(--rule)")
    opening = text[: text.index(">") + 1]
    box = re.search(r'viewBox="([^"]*)"', opening)
    assert box is not None  # matplotlib always writes one
    label = html.escape(alt, quote=True)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{label}">{text[len(opening) :]}'
