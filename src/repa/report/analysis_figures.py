"""Figures of what `repa analyse` finds: a quantity over depth, noise level and training, and tables of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repa.base.errors import UserError
from repa.base.files import atomic_path
from repa.report.style import TEXT, frame, legend_label, line, new_figure, strong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
PANEL = 4.6, 3.5  # inches
LEGEND = 1.3  # inches beside the curves
PICTURE = 1.05  # inches of a picture's side in a table
MOST_IN_LEGEND = 8

Rows = Sequence[dict[str, Any]]


def depth_figure(rows: Rows, value: str, label: str) -> Figure:
    """Curves over depth, as in Figures 2 and 3 of the paper, with a heat map for each network asked at several noise levels,
    as in Figure 8, and the best block over training where several checkpoints were asked.

    Args:
        rows: {run, step, t, depth, <value>}; a row without depth is of an encoder, and is drawn as a level.
        value: the key of what is drawn.
        label: what the axis calls it.
    """
    of_runs = [row for row in rows if row.get("depth") is not None]
    if not of_runs:
        raise UserError("There is nothing to draw: no row has a depth.")
    networks = list(dict.fromkeys((row["run"], row["step"]) for row in of_runs))
    maps = [n for n in networks if len({row["t"] for row in of_runs if _network(row) == n}) > 1]
    steps = sorted({row["step"] for row in of_runs})
    panels = 1 + len(maps) + (len(steps) > 1)
    picture = new_figure(figsize=(PANEL[0] * panels + LEGEND * (1 + (len(steps) > 1)), PANEL[1]), layout="constrained")
    axes = picture.subplots(1, panels, squeeze=False)[0]
    _draw_depths(axes[0], rows, value, label)
    told = [row[value] for row in of_runs if not math.isnan(row[value])] or [0.0]  # NaN: a gap in curve and map
    ends = min(told), max(told)
    for panel, network in zip(axes[1:], maps, strict=False):
        _draw_map(panel, [row for row in of_runs if _network(row) == network], value, label, ends)
    if len(steps) > 1:
        _draw_training(axes[-1], of_runs, value, label)
    return picture


def picture_table(
    pictures: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str]
) -> Figure:
    """Pictures uint8 (H, W, 3) in rows and columns, enlarged without smoothing, each row and column with its label."""
    num_rows, num_columns = len(pictures), max(map(len, pictures))
    beside = 0.2 + 0.065 * max((len(part) for label in row_labels for part in label.split("\n")), default=0)
    above = 0.1 + 0.17 * max((label.count("\n") + 1 for label in column_labels if label), default=0)
    size = beside + PICTURE * num_columns, above + PICTURE * num_rows + 0.1
    picture = new_figure(figsize=size, facecolor="white")
    for r, row in enumerate(pictures):
        bottom = (PICTURE * (num_rows - 1 - r) + 0.1) / size[1]
        picture.text(
            (beside - 0.1) / size[0], bottom + PICTURE / 2 / size[1], row_labels[r] if row_labels else "",
            ha="right", va="center", fontsize=8, color=TEXT, parse_math=False,
        )  # fmt: skip
        for c, pixels in enumerate(row):
            box = ((beside + PICTURE * c) / size[0], bottom, 0.96 * PICTURE / size[0], 0.96 * PICTURE / size[1])
            axes = picture.add_axes(box)
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
            if r == 0 and c < len(column_labels):
                axes.set_title(column_labels[c], fontsize=8, color=TEXT, pad=3, parse_math=False)
    return picture


def save(picture: Figure, out: str | Path) -> Path:
    """Write a PNG, whole or not at all."""
    with atomic_path(out) as temporary:
        picture.savefig(temporary, format="png", dpi=DPI)
    return Path(out)


def _network(row: dict[str, Any]) -> tuple[str, int]:
    return row["run"], row["step"]


def _draw_depths(axes: Axes, rows: Rows, value: str, label: str) -> None:
    """A curve for each network and noise level: noise levels by colour and marker, networks by the kind of line."""
    of_runs = [row for row in rows if row.get("depth") is not None]
    series = list(dict.fromkeys((row["run"], row["step"], row["t"]) for row in of_runs))
    networks, times = list(dict.fromkeys(s[:2] for s in series)), sorted({s[2] for s in series})
    for number, one in enumerate(series):
        points = sorted((row["depth"], row[value]) for row in of_runs if (row["run"], row["step"], row["t"]) == one)
        network = networks.index(one[:2])
        look = strong(times.index(one[2]) if len(times) > 1 else network)
        named = len(series) <= MOST_IN_LEGEND or number in (0, len(series) - 1)
        name = legend_label(_series_name(one, series)) if named else None
        axes.plot(*zip(*points, strict=True), linestyle=line(network), label=name, **look)
    encoders = [row for row in rows if row.get("depth") is None and row["features"] == "patches"]
    for number, row in enumerate(encoders):  # averaged over tokens, as the hidden states are
        axes.axhline(row[value], color=TEXT, linewidth=1.2, linestyle=line(number + 1), label=legend_label(row["run"]))
    frame(axes, "depth (block)", label)
    axes.set_xticks(_ticks(sorted({row["depth"] for row in of_runs})))
    if len(series) + len(encoders) > 1:
        _legend(axes)


def _series_name(one: tuple[str, int, float], series: Sequence[tuple[str, int, float]]) -> str:
    """What tells a curve from the others: its run, step and noise level, as far as they differ."""
    run, step, t = one
    parts = [run] if len({s[0] for s in series}) > 1 else []
    parts += [f"step {step:,}"] if len({s[1] for s in series}) > 1 else []
    parts += [f"t = {t:g}"] if len({s[2] for s in series}) > 1 or not parts else []
    return ", ".join(parts)


def _draw_map(axes: Axes, rows: Rows, value: str, label: str, ends: tuple[float, float]) -> None:
    depths, times = (sorted({row[key] for row in rows}) for key in ("depth", "t"))
    grid = np.full((len(times), len(depths)), np.nan)
    for row in rows:
        grid[times.index(row["t"]), depths.index(row["depth"])] = row[value]
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=ends[0], vmax=ends[1])
    axes.set_xticks([depths.index(depth) for depth in _ticks(depths)], [f"{depth}" for depth in _ticks(depths)])
    axes.set_yticks(range(len(times)), [f"{t:g}" for t in times])
    axes.set_xlabel("depth (block)", color=TEXT)
    axes.set_ylabel("noise level t", color=TEXT)
    axes.set_title(f"{rows[0]['run']}, step {rows[0]['step']:,}", fontsize=9, color=TEXT, parse_math=False)
    axes.figure.colorbar(image, ax=axes, label=label)


def _draw_training(axes: Axes, rows: Rows, value: str, label: str) -> None:
    """The best block of each run and noise level against the training step."""
    series = list(dict.fromkeys((row["run"], row["t"]) for row in rows))
    for number, (run, t) in enumerate(series):
        mine = [row for row in rows if (row["run"], row["t"]) == (run, t)]
        steps = sorted({row["step"] for row in mine})
        best = [np.fmax.reduce([row[value] for row in mine if row["step"] == step]) for step in steps]
        axes.plot(steps, best, label=legend_label(f"{run}, t = {t:g}"), **strong(number))
    frame(axes, "training steps", f"{label}, best block")
    if len(series) <= MOST_IN_LEGEND:
        _legend(axes)


def _legend(axes: Axes) -> None:
    """Beside the axes, where it hides no curve."""
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
    for text in axes.legend(frameon=False, fontsize=8, labelcolor=TEXT, handlelength=3.5, **place).get_texts():
        text.set_parse_math(False)


def _ticks(depths: Sequence[int]) -> list[int]:
    """At most ten of the depths, the first among them."""
    return list(depths[:: -(-len(depths) // 10)])
