"""Curves of several runs in one axes: losses, distances and what else was logged, against steps, seconds or images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from repa.base.errors import UserError, nearest
from repa.report.distances import draw_distances
from repa.report.learning import QUANTITIES, Quantity
from repa.report.runs import Protocol, RunRecord, common_protocol, distance_name
from repa.report.speedups import Group, grouped
from repa.report.style import Horizontal, colour, dress, horizontal, legend_label, line, new_figure, strong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("denoising", "alignment", "frechet_distance", *QUANTITIES)
LOSS = Quantity("denoising loss")
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
            for the cosine is the similarity itself), "frechet_distance" (linear between the evaluations; of runs that
            differ in the seed only the mean, over each run thinner), or a key of `QUANTITIES`.
        against: "step", "seconds" or "images".
        protocol: which Fréchet distances, see `RunRecord.protocols`; the one that most runs share when None.
        size: inches.
    """
    if kind not in KINDS:
        raise UserError(f"There is no curve {kind!r}: choose from {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    picture = new_figure(figsize=size, layout="constrained")
    draw_curves(picture.add_subplot(), runs, kind, against=against, protocol=protocol)
    return picture


def draw_curves(
    axes: Axes, runs: Sequence[RunRecord], kind: str, *, against: str = "step", protocol: Protocol | None = None
) -> None:
    """What `curve_figure` draws, into given axes."""
    x_axis = horizontal(runs, against)
    groups = grouped(runs)
    if kind == "frechet_distance":
        protocol = protocol or common_protocol(runs)
        if protocol is not None:
            draw_distances(axes, groups, x_axis, protocol)
        label = "Fréchet distance" if protocol is None else distance_name(protocol)
    elif kind == "alignment":
        single = len({name for run in runs for name in run.alignment_names}) == 1
        for i, group in enumerate(groups):
            for j, name in enumerate(group.runs[0].alignment_names):
                words = alignment_label(group, name, single)
                _draw_training(axes, group, f"alignment/{name}", x_axis, words, i, j)
        label = alignment_axis(runs)
    else:
        quantity = QUANTITIES.get(kind, LOSS)
        for i, group in enumerate(groups):
            _draw_training(axes, group, kind, x_axis, group.label, i, quantity=quantity)
        if quantity.is_noisy:
            _frame_settled(axes)
        label = quantity.label
    dress(axes, label, x_axis.label)


def alignment_axis(runs: Sequence[RunRecord]) -> str:
    """Cosine similarity where every alignment is one, else the plain name of what is drawn."""
    similarities = {str(item.get("loss", "cosine")).partition(":")[0] for run in runs for item in run.alignments}
    return "cosine similarity" if similarities <= {"cosine"} else "alignment (− loss)"


def alignment_label(group: Group, name: str, single: bool) -> str:
    label = group.label if single else f"{group.label}: {name}"
    trained = {f"{item.get('target')}@{item.get('depth')}" for item in group.runs[0].alignments}
    return label if name in trained else f"{label} (only measured)"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) values, over the part that exists near the ends: no lag, no invented values."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def smoothing_window(num_values: int) -> int:
    return 2 * (round(num_values * SMOOTHING) // 2) + 1


def _draw_training(
    axes: Axes, group: Group, key: str, x_axis: Horizontal, label: str, number: int, style: int = 0,
    quantity: Quantity = LOSS,
) -> None:  # fmt: skip
    """Of one run faint raw values and the running mean over them, of several the running means; `style` tells several
    quantities of one run apart."""
    alone = len(group.runs) == 1
    for run in group.runs:
        x, y = run.series(key, x_axis.key)
        if not x:
            continue
        thin = slice(None, None, -(-len(x) // MOST_POINTS))
        x, y = np.asarray(x) / x_axis.scale, np.asarray(y) * quantity.scale
        look = strong(number) if alone else {**strong(number), "linewidth": 1.1, "alpha": 0.8}
        if alone and quantity.is_noisy:
            axes.plot(x[thin], y[thin], color=colour(number), alpha=0.3, linewidth=0.7)
        drawn = running_mean(y, smoothing_window(len(y))) if quantity.is_noisy else y
        name = legend_label(label) if run is group.runs[0] else None
        axes.plot(x[thin], drawn[thin], linestyle=line(style), markevery=0.15, label=name, **look)


def _frame_settled(axes: Axes) -> None:
    """The first rows of a training lie far from the rest and would flatten it: the frame holds what comes after."""
    settled = [y[len(y) // 10 :] for y in (np.asarray(drawn.get_ydata()) for drawn in axes.lines)]
    if settled:
        low, high = np.percentile(np.concatenate(settled), [0.5, 99.5])
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)
