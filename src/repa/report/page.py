"""One self-contained HTML page on one or several runs: nothing is fetched, nothing runs in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup, escape

from repa.base import extras
from repa.base.files import write_text
from repa.base.units import duration
from repa.recipes.paper_tables import printed
from repa.report.analyses import accuracies, read_analyses
from repa.report.curves import logged
from repa.report.figures import analysis_curve, curves, learning_curve
from repa.report.headline import verdict
from repa.report.pictures import analysis_pictures, check_images, sample_pictures
from repa.report.results import results as find_results
from repa.report.results import without_paper
from repa.report.runs import PROTOCOL, RunRecord, add_evaluations, distance_name, is_number, read_runs
from repa.report.speedups import group_indices, group_speedups, grouped
from repa.report.style import COLOURS
from repa.report.summary import config_differences, data_facts, reached_text, summary_rows, summary_table
from repa.report.tables import has_seeds, shown, speedup_cells, write_csv, write_markdown
from repa.report.text import count, figure, how_made, short_count

if TYPE_CHECKING:
    import numpy as np


def write_report(
    runs: Sequence[str | Path | RunRecord],
    out: str | Path,
    *,
    title: str = "Representation alignment: what the runs did",
    names: Sequence[str] | None = None,
    results: Sequence[str | Path] = (),
    facts: Mapping[str, str] | None = None,
    commands: Sequence[str] | None = None,
    training_images: np.ndarray | None = None,
    training_captions: Sequence[str] = (),
    tables: bool = False,
) -> Path:
    """Write the report of one or several run folders; returns `out`.

    Args:
        runs: run folders, in the order in which they are shown; the first without alignment is the baseline. Runs that
            differ in nothing but the seed are taken together.
        out: the HTML file.
        title: heading of the page.
        names: what the runs are called, the folders' names when None.
        results: files of `repa evaluate --out` in addition to those in the runs' folders, also for samples of no run here.
        facts: hardware, versions, sizes, times: name -> value. `machine_facts()` gives those of this process.
        commands: the shell commands that produced the runs.
        training_images: uint8 (N, H, W, 3), shown below the samples.
        training_captions: what is written under each of them, such as the name of its class.
        tables: write the tables as Markdown and CSV too, next to `out` and under its name.

    Raises:
        UserError: a folder is not a run, names do not fit, a file is damaged or training_images are not uint8 images.
    """
    out = Path(out)
    if training_images is not None:
        check_images(training_images, "training_images")
    records, others = add_evaluations(read_runs(runs, names), results)
    analyses, groups, said = read_analyses(records), grouped(records), verdict(records)
    probed = accuracies(analyses)
    measured, speedups = find_results(groups, others, probed), group_speedups(groups)
    learning, constant = logged(records)
    drawn = curves(records)
    values = {
        "title": title,
        "verdict": said,
        "runs": records,
        "colour_of": group_indices(records, groups),
        "num_colours": len(COLOURS),
        "rows": summary_rows(records),
        "results": measured,
        "speedups": [speedup_cells(each) for each in speedups],
        "reported": without_paper(measured, groups),
        "top": drawn[0] if drawn else None,
        "curves": drawn[1:],
        "learning": [learning_curve(records, key) for key in learning],
        "constant": constant,
        "analyses": [analysis_curve(each, number) for number, each in enumerate(analyses) if each.best],
        "probed": probed,
        "analysis_pictures": [(run, picture) for run in records for picture in analysis_pictures(run)],
        **sample_pictures(records, groups, training_images, training_captions),
        "differences": config_differences(records),
        "configs": [yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in records],
        "evaluations": [_evaluation_table(run) for run in records],
        "facts": {**data_facts(records), **(facts or {})},
        "commands": list(commands or []),
    }
    write_text(out, _environment().get_template("page.html").render(values))
    if tables:
        whole = find_results(groups, others, probed, thin=False)
        write_markdown(out.with_suffix(".md"), title, said, measured, speedups, summary_table(records))
        write_csv(out.with_suffix(".csv"), whole)
    return out


def _environment() -> Any:
    jinja2 = extras.need("jinja2", "The report")

    def source(name: str) -> str:
        return resources.files("repa.report").joinpath(name).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": count, "duration": duration, "figure": figure, "how_made": how_made, "short_count": short_count,
        "printed": printed, "reached_text": reached_text, "shown": shown, "has_seeds": has_seeds,
        "distance_name": distance_name, "breakable": breakable,
    }  # fmt: skip
    return environment


def breakable(name: str) -> Markup:
    """A run's name that may break after a slash."""
    return Markup("/<wbr>").join(escape(part) for part in name.split("/"))


def _evaluation_table(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) with everything the evaluations hold, in the order in which it was first written."""
    aside = ("kind", "run", "samples")
    keys = [key for key in dict.fromkeys(key for row in run.evals for key in row) if key not in aside]
    keys.sort(key=lambda key: key in PROTOCOL)  # the numbers first, how they were made after
    return keys, [[_shown(row.get(key)) for key in keys] for row in run.evals]


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return count(value) if is_number(value) else str(value)
