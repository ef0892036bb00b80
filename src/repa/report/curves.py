"""Curves of several runs in one axes: losses, distances and other logged values, against steps, seconds or images."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from repa.base.errors import UserError, choices
from repa.report.runs import DISTANCE, Protocol, RunRecord, common_protocol, distance_name, is_number
from repa.report.speedups import SeedGroup, group_seeds, speedups_of_groups
from repa.report.style import (
    TEXT,
    colour,
    draw_legend,
    label_axes,
    legend_label,
    line_style,
    main_line,
    new_figure,
    short_number,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.04  # window of the running mean, as a share of the log entries
MOST_POINTS = 1500  # per line: more are not visible and would enlarge the page
SIZE = (5.6, 3.7)  # of a figure, in inches
FRAME = 5  # upper limit, in last distances of the worst run: the first values would flatten the rest

Points = dict[int, tuple[float, float]]  # step -> place on the horizontal axis, distance


class Quantity(NamedTuple):
    """A key of the log entries, and how it is plotted."""

    label: str
    scale: float = 1.0  # factor of the logged value
    is_noisy: bool = True  # plot a running mean over faint raw values; otherwise the raw line
    form: str = "{}"  # sentence that replaces a flat line


QUANTITIES = {
    "grad_norm": Quantity("gradient norm", form="The gradient norm was {} throughout."),
    "learning_rate": Quantity("learning rate", is_noisy=False, form="The learning rate was {} throughout."),
    "skipped_steps": Quantity(
        "skipped steps, so far", is_noisy=False, form="Steps skipped for gradients that are not finite: {}."
    ),
    "data_wait": Quantity(
        "wait for data (ms per step)", 1000.0, form="The wait for data was {} ms per step throughout."
    ),
    "images_per_second": Quantity("images per second", form="Images per second: {} throughout."),
    "loss_scale": Quantity("loss scale", is_noisy=False, form="The loss scale was {} throughout."),
    "utilisation": Quantity("share of the matrix-product rate", form="The MFU was {} throughout."),
    "peak_memory": Quantity("peak memory (GiB)", 2.0**-30, False, "Peak memory was {} GiB throughout."),
}
LOSS = Quantity("denoising loss")
KINDS = ("denoising", "alignment", DISTANCE, *QUANTITIES)


class XAxis(NamedTuple):
    """The horizontal axis: a key of the rows, what to divide it by, and its label."""

    key: str
    scale: float
    label: str


# key of the log entries -> label, and units; a curve spans at least three of its unit
UNITS = {
    "step": ("training steps", ((1.0, ""),)),
    "images": ("training images", ((1e6, " (millions)"), (1e3, " (thousands)"), (1.0, ""))),
    "seconds": (
        "training time",
        ((86400.0, " (days)"), (3600.0, " (hours)"), (60.0, " (minutes)"), (1.0, " (seconds)")),
    ),
}


def _x_axis(runs: Sequence[RunRecord], against: str) -> XAxis:
    """Steps, or images or time in a unit that suits the longest run."""
    if against not in UNITS:
        raise UserError(f"Unknown horizontal axis {against!r}{choices(against, UNITS)}")
    label, units = UNITS[against]
    most = max((row.get(against) or 0.0 for run in runs for row in [*run.train, *run.evals]), default=0.0)
    scale, unit = next(each for each in units if most >= 3 * each[0] or each == units[-1])
    return XAxis(against, scale, label + unit)


def logged(records: Sequence[RunRecord]) -> tuple[list[str], list[str]]:
    """(keys to plot, sentences on keys that are constant over all runs)."""
    moving, sentences = [], []
    for key, quantity in QUANTITIES.items():
        values = {row[key] for run in records for row in run.train if is_number(row.get(key))}
        if len(values) > 1:
            moving.append(key)
        elif values:
            value = values.pop() * quantity.scale
            sentences.append(quantity.form.format(f"{value:g}" if key != "peak_memory" else short_number(value)))
    return moving, sentences


def curve_figure(
    runs: Sequence[RunRecord],
    kind: str,
    *,
    against: str = "step",
    protocol: Protocol | None = None,
) -> Figure:
    """All runs in one axes.

    Args:
        runs: from `read_runs`; a run without this quantity is left out.
        kind: "denoising" (a running mean over the faint raw values), "alignment" (the negative alignment loss, which
            for the cosine is the similarity itself), "frechet_distance" (linear between the evaluations; of runs that
            differ in the seed only the mean, over each run thinner), or a key of `QUANTITIES`.
        against: "step", "seconds" or "images".
        protocol: which Fréchet distances, see `RunRecord.protocols`; the one that most runs share when None.
    """
    if kind not in KINDS:
        raise UserError(f"Unknown curve {kind!r}{choices(kind, KINDS)}")
    picture = new_figure(figsize=SIZE, layout="constrained")
    draw_curves(picture.add_subplot(), runs, kind, against=against, protocol=protocol)
    return picture


def draw_curves(
    axes: Axes, runs: Sequence[RunRecord], kind: str, *, against: str = "step", protocol: Protocol | None = None
) -> None:
    """What `curve_figure` draws, into given axes."""
    x_axis = _x_axis(runs, against)
    groups = group_seeds(runs)
    if kind == DISTANCE:
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
    _finish(axes, label, x_axis.label)


def _finish(axes: Axes, label: str, x_label: str) -> None:
    """Labels, a quiet grid and a legend; no frame."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    label_axes(axes, x_label, label)
    if axes.get_legend_handles_labels()[0]:
        draw_legend(axes, fontsize=9)
    else:
        axes.text(0.5, 0.5, "not logged", color=TEXT, ha="center", transform=axes.transAxes)


def alignment_axis(runs: Sequence[RunRecord]) -> str:
    """Cosine similarity if every alignment has the cosine loss, otherwise the general name."""
    similarities = {str(item.get("loss", "cosine")).partition(":")[0] for run in runs for item in run.alignments}
    return "cosine similarity" if similarities <= {"cosine"} else "alignment (− loss)"


def alignment_label(group: SeedGroup, name: str, single: bool) -> str:
    label = group.label if single else f"{group.label}: {name}"
    trained = {f"{item.get('target')}@{item.get('depth')}" for item in group.runs[0].alignments}
    return label if name in trained else f"{label} (measure_only)"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) values, with a smaller window near the ends: no lag and no padding."""
    # Differences of cumulative sums: one pass for any window.
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    centre = np.arange(len(values))
    low, high = np.maximum(centre - window // 2, 0), np.minimum(centre + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def smoothing_window(num_values: int) -> int:
    return 2 * (round(num_values * SMOOTHING) // 2) + 1


def _draw_training(
    axes: Axes, group: SeedGroup, key: str, x_axis: XAxis, label: str, number: int, style: int = 0,
    quantity: Quantity = LOSS,
) -> None:  # fmt: skip
    """For one run, faint raw values and their running mean; for several, only running means. `style` distinguishes
    several quantities of one run."""
    alone = len(group.runs) == 1
    for run in group.runs:
        places, values = run.series(key, x_axis.key)
        if not places:
            continue
        # The mean is over all entries; only the plotted points are thinned.
        thin = slice(None, None, -(-len(places) // MOST_POINTS))
        x, y = np.asarray(places) / x_axis.scale, np.asarray(values) * quantity.scale
        look = main_line(number) if alone else {**main_line(number), "linewidth": 1.1, "alpha": 0.8}
        if alone and quantity.is_noisy:
            axes.plot(x[thin], y[thin], color=colour(number), alpha=0.3, linewidth=0.7)
        drawn = running_mean(y, smoothing_window(len(y))) if quantity.is_noisy else y
        name = legend_label(label) if run is group.runs[0] else None
        # Markers are placed by the length of the line; a single entry has no length.
        every = 0.15 if len(x) > 1 else 1
        axes.plot(x[thin], drawn[thin], linestyle=line_style(style), markevery=every, label=name, **look)


def _frame_settled(axes: Axes) -> None:
    """Limit the axis to the later entries: the first entries are far from the rest and would flatten it."""
    settled = [y[len(y) // 10 :] for y in (np.asarray(drawn.get_ydata()) for drawn in axes.lines)]
    if settled:
        low, high = np.percentile(np.concatenate(settled), [0.5, 99.5])
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def draw_distances(axes: Axes, groups: Sequence[SeedGroup], x_axis: XAxis, protocol: Protocol) -> None:
    """Linear between evaluations, as the interpolation is."""
    drawn: list[Points] = []
    for number, group in enumerate(groups):
        curves = [points for run in group.runs if (points := _points(run.distances(protocol), x_axis))]
        if not curves:
            continue
        for points in curves if len(curves) > 1 else ():
            axes.plot(*zip(*points.values(), strict=True), color=colour(number), linewidth=0.8, alpha=0.5)
        # Only evaluated seeds, which may be fewer than the runs.
        label = group.name if len(group.runs) == 1 else f"{group.name} ({len(curves)} seeds)"
        middle = mean_curve(curves)
        if middle:
            axes.plot(*zip(*middle, strict=True), label=legend_label(label), **main_line(number))
        drawn += curves
    if drawn:  # the first evaluations may be above the axis limit
        values = [y for points in drawn for _, y in points.values()]
        top = min(max(values), FRAME * max(list(points.values())[-1][1] for points in drawn))
        room = 0.06 * (top - min(values)) or 0.1 * top or 1.0
        axes.set_ylim(min(values) - room, top + room)
    _mark_speedups(axes, groups, x_axis, protocol)


def mean_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean at each step that all curves share; for a single curve, its points."""
    common = [step for step in curves[0] if all(step in points for points in curves)]
    places = [[points[step] for points in curves] for step in common]
    return [(fmean(x for x, _ in here), fmean(y for _, y in here)) for here in places]


def _points(rows: Sequence[dict[str, Any]], x_axis: XAxis) -> Points:
    usable = [row for row in rows if is_number(row.get(x_axis.key))]
    return {row["step"]: (row[x_axis.key] / x_axis.scale, row[DISTANCE]) for row in usable}


def _mark_speedups(axes: Axes, groups: Sequence[SeedGroup], x_axis: XAxis, protocol: Protocol) -> None:
    """A ring where each aligned run first reached the baseline's final distance, and a level if there is only one such distance."""
    found = [each for each in speedups_of_groups(groups) if each.pairs[0].protocol == protocol]
    if not found:
        return
    levels = {pair.target for each in found for pair in each.pairs}
    if len(levels) == 1:
        axes.axhline(levels.pop(), color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)), alpha=0.7)
    bottom = axes.get_ylim()[0]
    for each in found:
        number = groups.index(each.aligned)
        per_step = each.aligned.runs[0].batch_size if x_axis.key == "images" else 1
        for pair in each.pairs:
            if pair.aligned is None or per_step is None:
                continue
            where = pair.aligned.seconds if x_axis.key == "seconds" else pair.aligned.step
            if where is None:
                continue
            where *= per_step / x_axis.scale
            axes.vlines(where, bottom, pair.target, color=colour(number), linewidth=1.1, linestyle=(0, (2, 2)))
            axes.plot([where], [pair.target], marker="o", markersize=9, markerfacecolor="none", color=TEXT)
    axes.set_ylim(bottom=bottom)
