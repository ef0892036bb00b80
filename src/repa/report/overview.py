"""Images in rows and columns as one PNG: what runs did, for a README, and the tables of pictures of `repa analyse`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repa.base.errors import UserError
from repa.report.curves import draw_curves
from repa.report.pictures import has_preview, preview_columns, read_preview
from repa.report.runs import DISTANCE, Protocol, RunRecord, add_evaluations, common_protocol, read_runs
from repa.report.speedups import group_indices, grouped
from repa.report.style import TEXT, colour, new_figure, save_png
from repa.report.text import count, figure
from repa.runs import layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4  # samples of each run and step, 2 x 2
# inches
CELL, GAP = 1.36, 0.1  # side of those four, room between cells
NAME, NUMBER, ABOVE, BELOW = (
    1.0,
    0.24,
    0.42,
    0.5,
)  # a run's name, the number under a cell, steps above, the curve's label below
CURVE, CURVE_LABELS = 4.4, 0.75
PICTURE = 1.05  # side of a picture in a table


def save_figure(runs: Sequence[str | Path | RunRecord], out: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write a PNG: a row of previews for each run, a column for each step, next to the Fréchet distance against steps.

    Four samples stand for each step, evenly chosen from those of a preview. Runs without previews have no row; without
    evaluations the denoising loss is drawn instead.
    Raises UserError when there is neither a preview nor a logged step.
    """
    records, _ = add_evaluations(read_runs(runs, names))
    drawn = [(index, run) for index, run in enumerate(records) if layout.preview_steps(run.path)]
    if not drawn and not any(run.steps for run in records):
        raise UserError("There is nothing to draw: the runs have neither samples nor logged steps yet.")
    steps, protocol, groups = (
        preview_columns(records),
        common_protocol(records),
        group_indices(records, grouped(records)),
    )
    rows = max(len(drawn), 2)  # the curve needs the height of two
    width = NAME + len(steps) * (CELL + GAP) if drawn else 0.0
    size = width + CURVE_LABELS + CURVE + 0.2, ABOVE + rows * (CELL + NUMBER) + BELOW
    picture = new_figure(figsize=size, facecolor="white")
    for row, (index, run) in enumerate(drawn):
        _draw_row(picture, run, steps, row, colour(groups[index]), protocol)
    box = [width + CURVE_LABELS, BELOW, CURVE, size[1] - BELOW - ABOVE / 2]
    axes = picture.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
    kind = "frechet_distance" if any(run.protocols for run in records) else "denoising"
    draw_curves(axes, records, kind, protocol=protocol)
    return save_png(picture, out)


def _draw_row(
    picture: Figure, run: RunRecord, steps: Sequence[int], row: int, run_colour: str, protocol: Protocol | None
) -> None:
    """The name of a run, and its samples at every step with their distance."""
    width, height = picture.get_size_inches()
    bottom = height - ABOVE - (row + 1) * (CELL + NUMBER) + NUMBER
    style: dict[str, Any] = {"fontsize": 10, "color": TEXT, "va": "center", "parse_math": False}
    picture.text(
        (NAME - 0.12) / width, (bottom + CELL / 2) / height, run.name, **{**style, "color": run_colour}, ha="right", weight="bold"
    )  # fmt: skip
    found = {r["step"]: r[DISTANCE] for r in run.distances(protocol)} if protocol is not None else {}
    for column, step in enumerate(steps):
        left = NAME + column * (CELL + GAP)
        middle = (left + CELL / 2) / width
        if row == 0:
            picture.text(middle, (height - ABOVE / 2) / height, f"{count(step)} steps", **style, ha="center")
        if has_preview(run, step):
            axes = picture.add_axes((left / width, bottom / height, CELL / width, CELL / height))
            axes.imshow(_four(read_preview(run, step)), interpolation="lanczos", aspect="auto")
            axes.set_axis_off()
        if step in found:
            picture.text(middle, (bottom - NUMBER / 2) / height, figure(found[step]), **style, ha="center")


def _four(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, C) -> four of them, evenly chosen, 2 x 2 with a white line between: (2H + gap, 2W + gap, 3)."""
    chosen = images[np.linspace(0, len(images) - 1, SHOWN).round().astype(int)]
    side = chosen.shape[1]
    gap = max(1, side // 24)
    sheet = np.full((2 * side + gap, 2 * side + gap, 3), 255, np.uint8)
    for index, image in enumerate(chosen):
        top, left = index // 2 * (side + gap), index % 2 * (side + gap)
        sheet[top : top + side, left : left + side] = image
    return sheet


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
