"""Distances over training as curves: a group's runs, their mean, and where the baseline's final distance was reached."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from repa.report.runs import DISTANCE, Protocol, is_number
from repa.report.speedups import Group, group_speedups
from repa.report.style import TEXT, Horizontal, colour, legend_label, strong

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[int, tuple[float, float]]  # step -> place on the horizontal axis, distance

FRAME = 5  # times the last value of the worst run: the first values would flatten what matters


def draw_distances(axes: Axes, groups: Sequence[Group], x_axis: Horizontal, protocol: Protocol) -> None:
    """Linear between evaluations, as the interpolation is."""
    drawn: list[Points] = []
    for number, group in enumerate(groups):
        curves = [points for run in group.runs if (points := _points(run.distances(protocol), x_axis))]
        if not curves:
            continue
        for points in curves if len(curves) > 1 else ():
            axes.plot(*zip(*points.values(), strict=True), color=colour(number), linewidth=0.8, alpha=0.5)
        label = group.name if len(group.runs) == 1 else f"{group.name} ({len(curves)} seeds)"
        middle = mean_curve(curves)
        if middle:
            axes.plot(*zip(*middle, strict=True), label=legend_label(label), **strong(number))
        drawn += curves
    if drawn:  # the first evaluations may lie above the frame
        values = [y for points in drawn for _, y in points.values()]
        top = min(max(values), FRAME * max(list(points.values())[-1][1] for points in drawn))
        room = 0.06 * (top - min(values)) or 0.1 * top or 1.0
        axes.set_ylim(min(values) - room, top + room)
    _mark_speedups(axes, groups, x_axis, protocol)


def mean_curve(curves: Sequence[Points]) -> list[tuple[float, float]]:
    """The mean point at each step at which every curve has one; a single curve's own points."""
    common = [step for step in curves[0] if all(step in points for points in curves)]
    places = [[points[step] for points in curves] for step in common]
    return [(fmean(x for x, _ in here), fmean(y for _, y in here)) for here in places]


def _points(rows: Sequence[dict[str, Any]], x_axis: Horizontal) -> Points:
    usable = [row for row in rows if is_number(row.get(x_axis.key))]
    return {row["step"]: (row[x_axis.key] / x_axis.scale, row[DISTANCE]) for row in usable}


def _mark_speedups(axes: Axes, groups: Sequence[Group], x_axis: Horizontal, protocol: Protocol) -> None:
    """A ring where each aligned run first had the baseline's final distance, and that distance as a level if it is one."""
    found = [each for each in group_speedups(groups) if each.pairs[0].protocol == protocol]
    if not found:
        return
    levels = {pair.target for each in found for pair in each.pairs}
    if len(levels) == 1:
        axes.axhline(levels.pop(), color=TEXT, linewidth=0.9, linestyle=(0, (2, 3)), alpha=0.7)
    bottom = axes.get_ylim()[0]
    for each in found:
        number = groups.index(each.aligned)
        for pair in each.reached:
            where = pair.aligned.seconds if x_axis.key == "seconds" else pair.aligned.step
            if where is None:
                continue
            where *= (each.aligned.runs[0].batch_size if x_axis.key == "images" else 1) / x_axis.scale
            axes.vlines(where, bottom, pair.target, color=colour(number), linewidth=1.1, linestyle=(0, (2, 2)))
            axes.plot([where], [pair.target], marker="o", markersize=9, markerfacecolor="none", color=TEXT)
    axes.set_ylim(bottom=bottom)
