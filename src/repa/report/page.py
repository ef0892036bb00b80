"""One self-contained HTML page on one or several runs: it loads nothing and contains no scripts.

Its figures are inline SVG, each with a caption and a text alternative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from markupsafe import Markup, escape

from repa.analysis.config import meaning_of
from repa.base import imports
from repa.base.errors import escaped
from repa.base.files import write_text
from repa.base.reporting import duration
from repa.recipes.recipe import printed
from repa.report.analyses import Analysis, accuracies, depth_figure, read_analyses
from repa.report.curves import QUANTITIES, alignment_axis, curve_figure, logged, smoothing_window
from repa.report.headline import verdict
from repa.report.pictures import analysis_pictures, checked_images, sample_pictures
from repa.report.results import cell_text, has_seeds, speedup_cells, unmatched_paper_rows, write_csv, write_markdown
from repa.report.results import results as find_results
from repa.report.runs import (
    DISTANCE,
    PROTOCOL,
    Protocol,
    RunRecord,
    add_evaluations,
    distance_name,
    is_number,
    read_runs,
)
from repa.report.speedups import group_indices, group_seeds, speedups_of_groups
from repa.report.style import COLOURS, count, how_made, inline_svg, short_count, short_number
from repa.report.summary import config_differences, data_facts, reached_text, summary_rows, summary_table

if TYPE_CHECKING:
    import numpy as np


def write_report(
    runs: Sequence[str | Path | RunRecord],
    out: str | Path,
    *,
    title: str = "Representation alignment: comparison of runs",
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
        runs: run folders in display order; the first without alignment is the baseline. Runs that differ only in the seed
            form a group.
        out: the HTML file.
        title: heading of the page.
        names: names of the runs; None: the names of the folders.
        results: further files of `repa evaluate --out`, also for samples that belong to none of the runs.
        facts: hardware, versions, sizes, times: name -> value. `machine_facts()` returns those of this process.
        commands: the shell commands that produced the runs.
        training_images: uint8 (N, H, W, 3), shown below the samples.
        training_captions: caption of each training image, such as the name of its class.
        tables: also write the tables as Markdown and CSV, next to `out` with the same stem.

    Raises:
        UserError: a folder is not a run, names do not match, a file is damaged, or training_images are not uint8 images.
    """
    out = Path(out)
    if training_images is not None:
        checked_images(training_images, "training_images")
    records, others = add_evaluations(read_runs(runs, names), results)
    analyses, groups, headline = read_analyses(records), group_seeds(records), verdict(records)
    headline.notes.extend(f"{run.name}: {run.lost}" for run in records if run.lost)
    probed = accuracies(analyses)
    measured, compared = find_results(groups, others, probed), speedups_of_groups(groups)
    # one common evaluation is no curve, so no factor
    speedups = [each for each in compared if any(len(pair.overlap.steps) > 1 for pair in each.pairs)]
    learning, constant = logged(records)
    all_curves = curves(records)
    values = {
        "title": title,
        "verdict": headline,
        "runs": records,
        "colour_of": group_indices(records, groups),
        "num_colours": len(COLOURS),
        "rows": summary_rows(records),
        "results": measured,
        "speedups": [speedup_cells(each) for each in speedups],
        "reported": unmatched_paper_rows(measured, groups),
        "top": all_curves[0] if all_curves else None,
        "curves": all_curves[1:],
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
        write_markdown(out.with_suffix(".md"), title, headline, measured, speedups, summary_table(records))
        write_csv(out.with_suffix(".csv"), whole)
    return out


def _environment() -> Any:
    jinja2 = imports.need("jinja2", "The report")

    def source(name: str) -> str:
        return resources.files("repa.report").joinpath(name).read_text("utf-8")

    # Names of runs and classes come from files, so they are escaped. A name missing from the template is an error, not a gap.
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source), autoescape=True, finalize=_without_control_characters, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "count": count, "duration": duration, "short_number": short_number, "how_made": how_made, "short_count": short_count,
        "printed": printed, "reached_text": reached_text, "cell_text": cell_text, "has_seeds": has_seeds,
        "distance_name": distance_name, "breakable": breakable, "with_code": with_code,
    }  # fmt: skip
    return environment


def _without_control_characters(value: Any) -> Any:
    """Text for the page, without bidirectional control characters."""
    return type(value)(escaped(value)) if isinstance(value, str) else value


def breakable(name: str) -> Markup:
    """A run's name that may wrap after a slash."""
    return Markup("/<wbr>").join(escape(part) for part in name.split("/"))


def with_code(text: str) -> Markup:
    """Text in which `words between backquotes` are code, whose options do not break at their hyphens."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a name holds a backquote
        return escape(text)
    words = [
        Markup(" ").join(Markup("<code>{}</code>").format(word) for word in part.split(" "))
        if number % 2
        else escape(part)
        for number, part in enumerate(parts)
    ]
    return Markup("").join(words)


def _evaluation_table(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) with all values of the evaluations, in the order of their first appearance."""
    aside = ("kind", "run", "samples")  # the same in every row, or a path
    keys = [key for key in dict.fromkeys(key for row in run.evals for key in row) if key not in aside]
    keys.sort(key=lambda key: key in PROTOCOL)  # numbers first, then the protocol
    return keys, [[_value_text(row.get(key)) for key in keys] for row in run.evals]


def _value_text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return count(value) if is_number(value) else str(value)


class Curve(NamedTuple):
    """An inline SVG, its caption and its width in inches."""

    svg: str
    caption: str
    width: float = 0.0


def curves(records: Sequence[RunRecord]) -> list[Curve]:
    """The distances first (one figure per protocol), then the losses; a value that no run logged has no figure."""
    found = []
    protocols = list(dict.fromkeys(p for run in records for p in run.protocols))
    for number, protocol in enumerate(protocols):
        rows = [row for run in records for row in run.distances(protocol)]
        if len({row["step"] for row in rows}) > 1:  # a single step appears in a table, not as a curve
            found += [
                _distance_curve(records, protocol, number, against)
                for against in ("step", "seconds", "images")
                if any(is_number(row.get(against)) for row in rows)
            ]
    if any(run.series("denoising")[0] for run in records):
        words = "Denoising loss, lower is better; its first values may be cut off."
        found.append(_loss_curve(records, "denoising", words))
    if any(run.alignment_names for run in records):
        axis = alignment_axis(records)
        words = f"Alignment ({axis}) of projected hidden tokens and the encoder’s, higher is closer."
        found.append(_loss_curve(records, "alignment", words))
    return found


def learning_curve(records: Sequence[RunRecord], key: str) -> Curve:
    """A key of `QUANTITIES` against steps."""
    quantity = QUANTITIES[key]
    ends = [(run.name, y) for run in records if (y := run.series(key)[1])]
    parts = [
        f"{name} from {short_number(y[0] * quantity.scale)} to {short_number(y[-1] * quantity.scale)}"
        for name, y in ends
    ]
    alt = f"{quantity.label} against training steps: {'; '.join(parts)}."
    words = f"{_capitalised(quantity.label)}."
    caption = _smoothed(records, words) if quantity.is_noisy else words
    return Curve(inline_svg(curve_figure(records, key), key, alt), caption)


def analysis_curve(analysis: Analysis, number: int) -> Curve:
    """Curves over depth, heat maps over noise levels, the best block over training."""
    picture = depth_figure(analysis.rows, analysis.value, analysis.label)
    parts = [
        f"{row['run']} at {count(row['step'])} steps is highest at block {row['depth']}, t = {row['t']:g}, with {row[analysis.value]:.3f}"
        for row in analysis.best
    ]
    svg = inline_svg(picture, f"analysis-{number}", f"{analysis.label} over depth: {'; '.join(parts)}.")
    return Curve(svg, _analysis_caption(analysis), float(picture.get_figwidth()))


def _distance_curve(records: Sequence[RunRecord], protocol: Protocol, number: int, against: str) -> Curve:
    picture = curve_figure(records, DISTANCE, against=against, protocol=protocol)
    ends = [(run.name, rows[0], rows[-1]) for run in records if (rows := run.distances(protocol))]
    parts = [
        f"{name} goes from {short_number(first[DISTANCE])} at {count(first['step'])} steps "
        f"to {short_number(last[DISTANCE])} at {count(last['step'])} steps"
        for name, first, last in ends
    ]
    axis = {"step": "training steps", "seconds": "time", "images": "training images"}[against]
    alt = f"{distance_name(protocol)} against {axis}: {'; '.join(parts)}."
    has_seeds = len(group_seeds(records)) < len(records)
    seeds = " Thin: each seed; strong: their mean at shared steps." if has_seeds else ""
    caption = {
        "step": f"{distance_name(protocol)}: lower is better, 0 is the reference itself. Dotted: the baseline’s last value; "
        f"ring: where an aligned run first reached it. First values far above the rest may be cut off.{seeds} Protocol: "
        f"{how_made(protocol)}.",
        "seconds": "The same against training time, which includes the cost of alignment.",
        "images": "The same against training images, with repetitions: steps times batch size.",
    }
    return Curve(inline_svg(picture, f"distance-{number}-{against}", alt), caption[against])


def _loss_curve(records: Sequence[RunRecord], kind: str, words: str) -> Curve:
    """kind: "denoising" or "alignment"."""
    parts = []
    for row in summary_rows(records):
        final = row["alignment"] if kind == "alignment" else {"": row["denoising"]}
        parts += [f"{row['name']} {name} ends at {value:.3f}" for name, value in final.items() if value is not None]
    alt = f"{_capitalised(kind)} against training steps: {'; '.join(parts)}."
    return Curve(inline_svg(curve_figure(records, kind), kind, alt), _smoothed(records, words))


def _smoothed(records: Sequence[RunRecord], what: str) -> str:
    """The caption of a smoothed curve."""
    window = max(smoothing_window(len(run.train)) for run in records)
    mean = f"centred mean over up to {window} rows"
    if len(group_seeds(records)) < len(records):
        return f"{what} One line per seed: {mean if window > 1 else 'as logged'}."
    return f"{what} Faint: as logged; strong: {mean}." if window > 1 else f"{what} As logged."


def _analysis_caption(analysis: Analysis) -> str:
    given = analysis.settings
    parts = []
    if given.get("num_images"):
        parts.append(f"{count(given['num_images'])} images")
    elif "num_images" in given:
        parts.append("all images")
    data = f"of {Path(str(given.get('data'))).name}"
    if analysis.kind == "probe":
        tested = Path(given["val"]).name if given.get("val") else "a fifth of them"
        parts.append(f"{data}, tested on {tested}")
        parts.append(f"{given.get('epochs')} epochs; the best of the learning rates")
    else:
        parts.append(data)
    if analysis.kind == "cknna":
        parts.append(f"k = {given.get('neighbours')}, the {given.get('variant')} variant")
    caption = f"{_capitalised(analysis.label)} of each block: {'; '.join(parts)}. t = 0 is data."
    chance = given.get("chance")
    known = is_number(chance) or analysis.kind in ("cka", "cka-unbiased")
    return f"{caption} {_capitalised(meaning_of(analysis.kind, chance))}." if known else caption


def _capitalised(words: str) -> str:
    return words[0].upper() + words[1:]
