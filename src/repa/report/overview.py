"""One wide picture of what runs did, for a README: the last samples of each run, and the Fréchet distance."""

from collections.abc import Sequence
from pathlib import Path

from repa.base.errors import UserError
from repa.base.files import atomic_path
from repa.report.curves import draw_curves
from repa.report.pictures import MOST_IMAGES, read_preview, tile_pixels
from repa.report.protocols import DISTANCE, Protocol, distance_name
from repa.report.records import RunRecord, common_protocol, read_runs
from repa.report.seeds import group_indices, grouped
from repa.report.style import colour, new_figure
from repa.report.text import count, figure
from repa.runs import layout

# inches
TILE, CURVE = 2.9, 5.2  # height of every panel, width of the curve
ABOVE, BELOW, BESIDE = 0.6, 0.55, 0.25  # two lines of title, the axis label, the gap between panels
CURVE_LABELS = 0.6
DPI = 160


def save_figure(runs: Sequence[str | Path | RunRecord], out: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write a PNG: previews of each run's last step beside the Fréchet distance against steps.

    Runs without previews have no panel; without evaluations the denoising loss is drawn instead.
    Raises UserError when there is neither a preview nor a logged step.
    """
    out, records = Path(out), read_runs(runs, names)
    drawn = [(i, run, steps[-1]) for i, run in enumerate(records) if (steps := layout.preview_steps(run.path))]
    if not drawn and not any(run.steps for run in records):
        raise UserError("There is nothing to draw: the runs have neither samples nor logged steps yet.")
    tiles = [tile_pixels(read_preview(run, step)[:MOST_IMAGES]) for _, run, step in drawn]
    widths = [TILE * pixels.shape[1] / pixels.shape[0] for pixels in tiles]
    size = sum(width + BESIDE for width in widths) + CURVE_LABELS + CURVE + 2 * BESIDE, ABOVE + TILE + BELOW
    picture = new_figure(figsize=size, facecolor="white")

    def panel(left: float, width: float):
        return picture.add_axes((left / size[0], BELOW / size[1], width / size[0], TILE / size[1]))

    left, protocol, groups = BESIDE, common_protocol(records), group_indices(records, grouped(records))
    for (index, run, step), pixels, width in zip(drawn, tiles, widths, strict=True):
        axes = panel(left, width)
        axes.imshow(pixels, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        axes.set_title(_panel_title(run, step, protocol), fontsize=10, color=colour(groups[index]), parse_math=False)
        left += width + BESIDE
    kind = "frechet_distance" if any(run.protocols for run in records) else "denoising"
    draw_curves(panel(left + CURVE_LABELS, CURVE), records, kind, protocol=protocol)
    with atomic_path(out) as temporary:
        picture.savefig(temporary, format="png", dpi=DPI)
    return out


def _panel_title(run: RunRecord, step: int, protocol: Protocol | None) -> str:
    rows = [row for row in run.distances(protocol) if row["step"] == step] if protocol is not None else []
    distance = f", {distance_name(protocol)} {figure(rows[-1][DISTANCE])}" if rows else ""
    return f"{run.name}\n{count(step)} steps{distance}"
