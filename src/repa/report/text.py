"""Numbers and settings in words, as a reader wants them."""

import json
from typing import Any

from repa.report.records import Protocol


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


def duration(seconds: float) -> str:
    """33.1 -> '33 s', 725 -> '12 min 5 s', 74400 -> '20 h 40 min'."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def how_made(protocol: Protocol) -> str:
    """The sentence that stands near a Fréchet distance: features, number of samples, sampler, NFE, weights."""
    given = {key: json.loads(value) for key, value in protocol}
    parts = []
    if "num_samples" in given:
        parts.append(f"{count(given['num_samples'])} samples")
    if "features" in given:
        parts.append(f"features of {given['features']}")
    if "sampler" in given:
        steps = f", {given['steps']} steps" if "steps" in given else ""
        parts.append(f"sampler {given['sampler']}{steps}")
    if "nfe" in given:
        parts.append(f"{given['nfe']} network evaluations (NFE) per sample")
    if "guidance" in given:
        parts.append(f"guidance {_plain(given['guidance'])}")
    if "weights" in given:
        parts.append("EMA weights" if given["weights"] == "ema" else f"weights: {given['weights']}")
    return "; ".join(parts) or "how it was made was not recorded"


def listed(names: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
