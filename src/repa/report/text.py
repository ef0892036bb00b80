"""Numbers and settings as readable text."""

from collections.abc import Callable
from typing import Any

from repa.report.runs import Protocol, settings_of
from repa.report.speedups import Spread

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
    return f"guidance {' then '.join(given)}" if isinstance(given, list) else f"guidance {given}"


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
