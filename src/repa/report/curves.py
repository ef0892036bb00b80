"""Curves of several runs in one axes: denoising loss, alignment and Fréchet distance, against steps or seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from repa.base.errors import UserError, nearest
from repa.report.records import Protocol, RunRecord
from repa.report.style import TEXT, Horizontal, colour, dress, horizontal, legend_label, line, strong
from repa.report.summary import baseline_of, speedup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("denoising", "alignment", "frechet_distance")
FRAME_OF_DISTANCES = 5  # times the last value of the worst run: the first values would flatten what matters
SMOOTHING = 0.04  # the running mean spans this part of the logged rows
MOST_POINTS = 1500  # drawn per line: more cannot be seen and would swell the page


def curve_figure(
    runs: Sequence[RunRecord],
    kind: str,
    *,
    against: str = "step",
    protocol: Protocol | None = None,
    size: tuple[float, float] = (5.6, 3.7),
) -> Figure:
    """All runs in one axes.

    Args:
        runs: from `read_runs`; a run without this quantity is left out of the picture.
        kind: "denoising" (a running mean over the faint raw values), "alignment" (the negative alignment loss, which
            for the cosine is the similarity itself) or "frechet_distance" (linear between the evaluations).
        against: "step" or "seconds".
        protocol: which Fréchet distances, see `RunRecord.protocols`; the first that is found when None.
        size: inches.
    """
    from matplotlib.figure import Figure

    if kind not in KINDS:
        raise UserError(f"There is no curve {kind!r}: choose from {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    picture = Figure(figsize=size, layout="constrained")
    draw_curves(picture.add_subplot(), runs, kind, against=against, protocol=protocol)
    return picture


def draw_curves(
    axes: Axes, runs: Sequence[RunRecord], kind: str, *, against: str = "step", protocol: Protocol | None = None
) -> None:
    """What `curve_figure` draws, into given axes."""
    x_axis = horizontal(runs, against)
    if kind == "frechet_distance":
        protocol = protocol or next((p for run in runs for p in run.protocols), None)
        if protocol is not None:
            _draw_distances(axes, runs, x_axis, protocol)
        label = "Fréchet distance"
    elif kind == "denoising":
        for i, run in enumerate(runs):
            _draw_training(axes, *run.series("denoising", against), x_axis.scale, run.name, i)
        _frame_settled(axes)
        label = "denoising loss"
    else:
        single = len({name for run in runs for name in run.alignment_names}) == 1
        for i, run in enumerate(runs):
            for j, name in enumerate(run.alignment_names):
                values = run.series(f"alignment/{name}", against)
                _draw_training(axes, *values, x_axis.scale, alignment_label(run, name, single), i, j)
        label = alignment_axis(runs)
    dress(axes, label, x_axis.label)


def alignment_axis(runs: Sequence[RunRecord]) -> str:
    """Cosine similarity where every alignment is one, else the plain name of what is drawn."""
    similarities = {str(item.get("similarity", "cosine")).partition(":")[0] for run in runs for item in run.alignments}
    return "cosine similarity" if similarities <= {"cosine"} else "alignment (− loss)"


def alignment_label(run: RunRecord, name: str, single: bool) -> str:
    label = run.name if single else f"{run.name}: {name}"
    trained = {f"{item.get('target')}@{item.get('depth')}" for item in run.alignments}
    return label if name in trained else f"{label} (only measured)"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) values, over the part that exists near the ends: no lag, no invented values."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def smoothing_window(num_values: int) -> int:
    return 2 * (round(num_values * SMOOTHING) // 2) + 1


def _draw_training(axes: Axes, x: list, y: list, scale: float, label: str, run: int, style: int = 0) -> None:
    """Faint raw values, the running mean over them; `style` tells several quantities of one run apart."""
    if not x:
        return
    thin = slice(None, None, -(-len(x) // MOST_POINTS))
    x, smooth = np.asarray(x) / scale, running_mean(np.asarray(y), smoothing_window(len(y)))
    axes.plot(x[thin], y[thin], color=colour(run), alpha=0.3, linewidth=0.7)
    axes.plot(x[thin], smooth[thin], linestyle=line(style), markevery=0.15, label=legend_label(label), **strong(run))


def _frame_settled(axes: Axes) -> None:
    """The first rows of a training lie far from the rest and would flatten it: the frame holds what comes after."""
    settled = [y[len(y) // 10 :] for y in (np.asarray(drawn.get_ydata()) for drawn in axes.lines)]
    if settled:
        low, high = np.percentile(np.concatenate(settled), [0.5, 99.5])
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _draw_distances(axes: Axes, runs: Sequence[RunRecord], x_axis: Horizontal, protocol: Protocol) -> None:
    lows, finals, highest = [], [], 0.0
    for i, run in enumerate(runs):
        rows = [row for row in run.distances(protocol) if row.get(x_axis.key) is not None]
        if rows:
            x, y = np.array([[row[x_axis.key] / x_axis.scale, row["frechet_distance"]] for row in rows]).T
            axes.plot(x, y, label=legend_label(run.name), **strong(i))
            lows, finals, highest = [*lows, y.min()], [*finals, y[-1]], max(highest, y.max())
    if finals:  # linear, as the interpolation is; the first evaluations may lie above the frame
        top = min(highest, FRAME_OF_DISTANCES * max(finals))
        room = 0.06 * (top - min(lows)) or 0.1 * top or 1.0
        axes.set_ylim(min(lows) - room, top + room)
    _mark_speedups(axes, runs, x_axis, protocol)


def _mark_speedups(axes: Axes, runs: Sequence[RunRecord], x_axis: Horizontal, protocol: Protocol) -> None:
    """The baseline's final distance as a level, and where each aligned run first had it."""
    baseline = baseline_of(runs)
    found = [(i, speedup(baseline, run)) for i, run in enumerate(runs) if baseline is not None and run.is_aligned]
    found = [(i, pair) for i, pair in found if pair is not None and pair.protocol == protocol]
    if not found:
        return
    axes.axhline(found[0][1].target, color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)), alpha=0.7)
    bottom = axes.get_ylim()[0]
    for i, pair in found:
        where = getattr(pair.aligned, x_axis.key) if pair.aligned else None
        if where is None:
            continue
        where /= x_axis.scale
        axes.vlines(where, bottom, pair.target, color=colour(i), linewidth=1.1, linestyle=(0, (2, 2)))
        axes.plot([where], [pair.target], marker="o", markersize=9, markerfacecolor="none", color=TEXT)
    axes.set_ylim(bottom=bottom)
