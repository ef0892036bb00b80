"""Numbers and settings in words, as a reader wants them."""

from collections.abc import Callable
from typing import Any

from repa.report.runs import Protocol, settings_of
from repa.report.speedups import Spread

ABOUT_EQUAL = 0.05  # ratios this close to 1 are called about the same


def count(value: float) -> str:
    """1382 -> '1,382'."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """130300000 -> '130 M'; three digits."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def figure(value: float) -> str:
    """A measured figure with about three or four digits that mean something: 240.1, 10.75, 0.0123."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def with_deviation(found: Spread, words: Callable[[float], str]) -> str:
    """'8.51 ± 0.54', with the decimals of the mean; the value alone of one run."""
    mean = words(found.mean)
    if found.deviation is None:
        return mean
    decimals = len(mean.partition(".")[2])
    return f"{mean} ± {found.deviation:,.{decimals}f}"


def how_made(protocol: Protocol) -> str:
    """The sentence that stands near a Fréchet distance: features, reference, samples and labels, sampler, NFE, weights."""
    given = settings_of(protocol)
    parts = []
    if "num_samples" in given:
        labels = f" with {given['labels']} labels" if "labels" in given else ""
        parts.append(f"{count(given['num_samples'])} samples{labels}")
    if "features" in given:
        checksum = f" (weights {given['feature_weights']})" if "feature_weights" in given else ""
        arithmetic = f" in {given['features_precision']}" if "features_precision" in given else ""
        parts.append(f"features of {given['features']}{checksum}{arithmetic}")
    if "reference" in given:
        checksum = f" (checksum {given['reference_sha256'][:8]})" if "reference_sha256" in given else ""
        parts.append(f"against {given['reference']}{checksum}")
    if "sampler" in given:
        steps = f", {given['steps']} steps" if "steps" in given else ""
        parts.append(f"sampler {given['sampler']}{steps}")
    if "nfe" in given:
        parts.append(f"{given['nfe']} network evaluations (NFE) per sample")
    if "guidance" in given:
        parts.append(_guidance(given["guidance"]))
    for what, key in (("a weaker network", "weak_sha256"), ("an image", "guide_image_sha256")):
        if key in given:
            parts.append(f"guided by {what} (checksum {given[key][:8]})")
    if "decoder" in given:
        parts.append(f"decoded by {given['decoder']}")
    if "weights" in given:
        parts.append("EMA weights" if given["weights"] == "ema" else f"weights: {given['weights']}")
    if "neighbours" in given:
        parts.append(f"precision and recall in {given['neighbours']}")
    return "; ".join(parts) or "how it was made was not recorded"


def listed(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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
