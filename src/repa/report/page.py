"""One self-contained HTML page on one or several runs: nothing is fetched, nothing runs in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from repa.base.files import write_text
from repa.report.captions import distance_alt, distance_caption, training_alt, training_caption
from repa.report.configs import config_differences
from repa.report.curves import alignment_axis, curve_figure
from repa.report.facts import data_facts
from repa.report.findings import verdict
from repa.report.paper import printed, reported
from repa.report.pictures import Tile, check_images, has_preview, preview_columns, read_preview, tile
from repa.report.records import PROTOCOL, RunRecord, is_number, read_runs
from repa.report.style import COLOURS
from repa.report.summary import reached_text, summary_rows
from repa.report.svg import inline_svg
from repa.report.text import count, duration, figure, how_made, short_count

GRID_WIDTH = 930  # CSS pixels for the columns of the sample grid
LAST_WIDTH = 320  # and for each of the larger pictures

if TYPE_CHECKING:
    import numpy as np


class Curve(NamedTuple):
    """An inline SVG and its caption."""

    svg: str
    caption: str


class Cell(NamedTuple):
    """One run at one step of the sample grid; no tile where that run has no preview then."""

    tile: Tile | None
    distance: str
    alt: str


def write_report(
    runs: Sequence[str | Path | RunRecord],
    out: str | Path,
    *,
    title: str = "Representation alignment: what the runs did",
    names: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
    commands: Sequence[str] | None = None,
    training_images: np.ndarray | None = None,
) -> Path:
    """Write the report of one or several run folders; returns `out`.

    Args:
        runs: run folders, in the order in which they are shown; the first without alignment is the baseline.
        out: the HTML file.
        title: heading of the page.
        names: what the runs are called, the folders' names when None.
        facts: hardware, versions, sizes, times: name -> value. `machine_facts()` gives those of this process.
        commands: the shell commands that produced the runs.
        training_images: uint8 (N, H, W, 3), shown beside the last previews.

    Raises:
        UserError: a folder is no run, names do not fit, a preview is damaged or training_images are no uint8 images.
    """
    if training_images is not None:
        check_images(training_images, "training_images")
    records = read_runs(runs, names)
    values = {
        "title": title,
        "verdict": verdict(records),
        "runs": records,
        "num_colours": len(COLOURS),
        "rows": summary_rows(records),
        "reported": reported(records),
        "curves": _curves(records),
        **_samples(records, training_images),
        "differences": config_differences(records),
        "configs": [yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in records],
        "evaluations": [_evaluation_table(run) for run in records],
        "facts": {**data_facts(records), **(facts or {})},
        "commands": list(commands or []),
    }
    write_text(out, _environment().get_template("page.html").render(values))
    return Path(out)


def _environment():
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        return resources.files("repa.report").joinpath(name).read_text("utf-8")

    environment = Environment(
        loader=FunctionLoader(source), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "count": count, "duration": duration, "figure": figure, "how_made": how_made, "short_count": short_count,
        "printed": printed, "reached_text": reached_text,
    }  # fmt: skip
    return environment


def _curves(records: Sequence[RunRecord]) -> list[Curve]:
    """The Fréchet distance first (once per way it was made), then the losses; what nobody logged has no curve."""
    curves = []
    protocols = list(dict.fromkeys(p for run in records for p in run.protocols))
    for number, protocol in enumerate(protocols):
        for against in ("step", "seconds"):
            timed = [row for run in records for row in run.distances(protocol) if is_number(row.get(against))]
            if timed:
                name = f"distance-{number}-{against}"
                svg = inline_svg(
                    curve_figure(records, "frechet_distance", against=against, protocol=protocol),
                    name,
                    distance_alt(records, protocol, against),
                )
                curves.append(Curve(svg, distance_caption(protocol, against)))
    if any(run.series("denoising")[0] for run in records):
        svg = inline_svg(curve_figure(records, "denoising"), "denoising", training_alt(records, "denoising"))
        curves.append(
            Curve(svg, training_caption(records, "Denoising loss, lower is better; its first values may be cut off."))
        )
    if any(run.alignment_names for run in records):
        svg = inline_svg(curve_figure(records, "alignment"), "alignment", training_alt(records, "alignment"))
        caption = (
            f"Alignment ({alignment_axis(records)}) of projected hidden tokens and the encoder’s, higher is closer."
        )
        curves.append(Curve(svg, training_caption(records, caption)))
    return curves


def _samples(records: Sequence[RunRecord], training_images: np.ndarray | None) -> dict[str, Any]:
    """The grid (rows are runs, columns steps), and the last previews larger beside training images."""
    steps = preview_columns(records)
    grid = [[_cell(run, step) for step in steps] for run in records]
    last = [[cell.tile for cell in cells if cell.tile] for cells in grid]
    return {
        "steps": steps,
        "cell_width": min(LAST_WIDTH, GRID_WIDTH // max(len(steps), 1)),
        "grid": [(run, cells) for run, cells in zip(records, grid, strict=True) if any(cell.tile for cell in cells)],
        "last_width": LAST_WIDTH,
        "last": [(run, tiles[-1]) for run, tiles in zip(records, last, strict=True) if tiles],
        "training_tile": tile(training_images) if training_images is not None else None,
    }


def _cell(run: RunRecord, step: int) -> Cell:
    rows = [row for protocol in run.protocols[:1] for row in run.distances(protocol) if row["step"] == step]
    distance = figure(rows[-1]["frechet_distance"]) if rows else ""
    if not has_preview(run, step):
        return Cell(None, distance, "")
    drawn = tile(read_preview(run, step))
    score = f", Fréchet distance {distance}" if distance else ""
    return Cell(drawn, distance, f"{drawn.num_images} samples of {run.name} at {count(step)} steps{score}")


def _evaluation_table(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) with everything the evaluations hold, in the order in which it was first written."""
    keys = [key for key in dict.fromkeys(key for row in run.evals for key in row) if key != "kind"]
    keys.sort(key=lambda key: key in PROTOCOL)  # the numbers first, how they were made after
    return keys, [[_shown(row.get(key)) for key in keys] for row in run.evals]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return count(value) if is_number(value) else str(value)
