"""Results of `repa analyse` in the runs' folders, combined and plotted: CKNNA, CKA and probes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repa.analysis.collection import best
from repa.base.errors import UserError
from repa.base.files import read_json
from repa.report.runs import RunRecord, is_number
from repa.report.style import TEXT, draw_legend, label_axes, legend_label, line_style, main_line, new_figure
from repa.runs import layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUES = {"probe": "top1", "cknna": "cknna", "cka": "cka", "cka-unbiased": "cka-unbiased"}  # key of the rows
NAMES = {"probe": "top-1 accuracy", "cknna": "CKNNA", "cka": "CKA", "cka-unbiased": "CKA, unbiased"}
# settings that select rows or change how they are computed, but not their values
NOT_COMPARED = {"analysis", "rows", "runs", "checkpoints", "depths", "times", "learning_rates", "batch_size", "store", "repa",
         "encoder_weights"}  # fmt: skip
PANEL = 4.6, 3.5  # inches
LEGEND = 1.3  # inches next to the curves
# where the legend hides no curve
BESIDE = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8, "handlelength": 3.5}
MOST_IN_LEGEND = 8

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Analysis:
    """Rows {run, step, t, depth, <value>} with equal settings."""

    kind: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def value(self) -> str:
        return VALUES[self.kind]

    @property
    def label(self) -> str:
        variant = self.settings.get("variant", "paper") if self.kind == "cknna" else "paper"
        variant = "" if variant == "paper" else f" ({variant})"
        return NAMES[self.kind] + variant + (f" with {self.settings['encoder']}" if "encoder" in self.settings else "")

    @property
    def best(self) -> list[dict[str, Any]]:
        """The best row of each (run, step), over depths and noise levels."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for row in self.rows:
            key = row["run"], row["step"]
            if row["depth"] is not None and (key not in found or row[self.value] > found[key][self.value]):
                found[key] = row
        return list(found.values())


def read_analyses(records: Sequence[RunRecord]) -> list[Analysis]:
    """All rows in the folders of the runs, one `Analysis` per combination of settings; probes with their best learning
    rate. Raises UserError if a file is damaged."""
    found: dict[str, Analysis] = {}
    for run in records:
        for file in sorted((run.path / layout.ANALYSIS).glob("*.json")):
            content = _read_analysis(file)
            kind = content["analysis"]
            if kind not in VALUES:
                continue
            # Rows with different settings never share a curve.
            settings = {key: value for key, value in content.items() if key not in NOT_COMPARED}
            known = found.setdefault(json.dumps([kind, settings], sort_keys=True), Analysis(kind, settings))
            known.rows.extend(
                _with_run_name(row, run, records) for row in content["rows"] if is_number(row.get(known.value))
            )
    return [Analysis(each.kind, each.settings, best(each.rows, each.value)) for each in found.values() if each.rows]


def accuracies(analyses: Sequence[Analysis]) -> dict[tuple[str, int], float]:
    """(run, step) -> accuracy of the best block in per cent, like the paper's Acc.; of several probes, the first."""
    found: dict[tuple[str, int], float] = {}
    for analysis in (each for each in analyses if each.kind == "probe"):
        for row in analysis.best:
            found.setdefault((row["run"], row["step"]), 100 * row["top1"])
    return found


def _read_analysis(file: Path) -> dict[str, Any]:
    content = read_json(file)
    rows = content.get("rows") if isinstance(content, dict) else None
    if (
        not isinstance(rows, list)
        or not isinstance(content.get("analysis"), str)
        or not all(isinstance(r, dict) for r in rows)
    ):
        raise UserError(
            f"{file} is not a result of `repa analyse`: it has no analysis and rows. Remove it, or run the analysis again."
        )
    if any(not {"run", "step", "t", "depth"} <= row.keys() for row in rows if content["analysis"] in VALUES):
        raise UserError(f"{file} is damaged: some of its rows lack run, step, t or depth. Run `repa analyse` again.")
    return content


def _with_run_name(row: dict[str, Any], home: RunRecord, records: Sequence[RunRecord]) -> dict[str, Any]:
    """The row with the name of its run in this report; the file records the folder's name or its path."""
    if row["depth"] is None:
        return row
    asked = Path(str(row["run"])).name
    # Several folders may have the same name: the row belongs to the one next to the run that contains the file.
    fitting = [run for run in records if run.path.resolve().name == asked]
    beside = [run for run in fitting if run.path.resolve().parent == home.path.resolve().parent]
    found = [home] if home in fitting else beside if len(beside) == 1 else fitting
    return {**row, "run": found[0].name} if len(found) == 1 else row


def depth_figure(rows: Rows, value: str, label: str) -> Figure:
    """Curves over depth, as in Figures 2 and 3 of the paper, with a heat map for each network asked at several noise levels,
    as in Figure 8, and the best block over training where several checkpoints were asked.

    Args:
        rows: {run, step, t, depth, <value>}; a row without depth belongs to an encoder and is plotted as a level.
        value: key of the plotted value.
        label: label of the axis.
    """
    of_runs = [row for row in rows if row.get("depth") is not None]
    if not of_runs:
        raise UserError("There is nothing to plot: no row has a depth.")
    networks = list(dict.fromkeys((row["run"], row["step"]) for row in of_runs))
    maps = [n for n in networks if len({row["t"] for row in of_runs if _network_of(row) == n}) > 1]
    steps = sorted({row["step"] for row in of_runs})
    panels = 1 + len(maps) + (len(steps) > 1)
    picture = new_figure(figsize=(PANEL[0] * panels + LEGEND * (1 + (len(steps) > 1)), PANEL[1]), layout="constrained")
    axes = picture.subplots(1, panels, squeeze=False)[0]
    _draw_depths(axes[0], rows, value, label)
    finite = [row[value] for row in of_runs if not math.isnan(row[value])] or [0.0]  # NaN: a gap in curve and map
    ends = min(finite), max(finite)
    for panel, network in zip(axes[1:], maps, strict=False):
        _draw_map(panel, [row for row in of_runs if _network_of(row) == network], value, label, ends)
    if len(steps) > 1:
        _draw_training(axes[-1], of_runs, value, label)
    return picture


def _network_of(row: dict[str, Any]) -> tuple[str, int]:
    return row["run"], row["step"]


def _draw_depths(axes: Axes, rows: Rows, value: str, label: str) -> None:
    """One curve per network and noise level: colour and marker show the noise level, the line style the network."""
    of_runs = [row for row in rows if row.get("depth") is not None]
    series = list(dict.fromkeys((row["run"], row["step"], row["t"]) for row in of_runs))
    networks, times = list(dict.fromkeys(s[:2] for s in series)), sorted({s[2] for s in series})
    for number, one in enumerate(series):
        points = sorted((row["depth"], row[value]) for row in of_runs if (row["run"], row["step"], row["t"]) == one)
        network = networks.index(one[:2])
        look = main_line(times.index(one[2]) if len(times) > 1 else network)
        named = len(series) <= MOST_IN_LEGEND or number in (0, len(series) - 1)
        name = legend_label(_series_name(one, series)) if named else None
        axes.plot(*zip(*points, strict=True), linestyle=line_style(network), label=name, **look)
    encoders = [row for row in rows if row.get("depth") is None and row["features"] == "patches"]
    for number, row in enumerate(encoders):  # averaged over tokens, as the hidden states are
        axes.axhline(
            row[value], color=TEXT, linewidth=1.2, linestyle=line_style(number + 1), label=legend_label(row["run"])
        )
    label_axes(axes, "depth (block)", label)
    axes.set_xticks(_ticks(sorted({row["depth"] for row in of_runs})))
    if len(series) + len(encoders) > 1:
        draw_legend(axes, **BESIDE)


def _series_name(one: tuple[str, int, float], series: Sequence[tuple[str, int, float]]) -> str:
    """The label of a curve: its run, step and noise level, as far as they differ between curves."""
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
        axes.plot(steps, best, label=legend_label(f"{run}, t = {t:g}"), **main_line(number))
    label_axes(axes, "training steps", f"{label}, best block")
    if len(series) <= MOST_IN_LEGEND:
        draw_legend(axes, **BESIDE)


def _ticks(depths: Sequence[int]) -> list[int]:
    """At most ten of the depths, the first among them."""
    return list(depths[:: -(-len(depths) // 10)])
