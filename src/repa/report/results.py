"""Results in the layout of the paper's tables (Iter., FID, sFID, IS, Prec., Rec., Acc.), one table per protocol.

The tables are written as HTML, Markdown and CSV."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa.alignment.config import AlignmentConfig
from repa.autoencoders import AUTOENCODER
from repa.base import files
from repa.base.errors import in_markdown
from repa.diffusion.config import DiffusionConfig
from repa.evaluation.config import INCEPTION, is_private
from repa.models.config import ModelConfig
from repa.recipes.paper import ROWS, Row
from repa.recipes.recipe import CLASSES, FACTOR, IMAGES, REFERENCE, SAMPLES, PublishedResult, printed
from repa.report.headline import Verdict
from repa.report.runs import (
    DISTANCE,
    PROTOCOL,
    OtherSamples,
    Protocol,
    RunRecord,
    distance_name,
    is_number,
    protocol_of,
    settings_of,
)
from repa.report.speedups import SeedGroup, SeedSpeedup, Spread, spread
from repa.report.style import count, how_made, short_number, with_deviation
from repa.runs import layout

MOST_STEPS = 8  # per run in a table; the .csv has all
METRICS = {
    "sfid": "sFID ↓",
    "inception_score": "IS ↑",
    "precision": "Prec. ↑",
    "recall": "Rec. ↑",
    "accuracy": "Acc. ↑",
    "kid": "KID ↓",
    "kd": "Kernel distance ↓",
    "caption_agreement": "Caption agreement ↑",
    "clip_score": "CLIP score ↑",
    "clip_agreement": "CLIP agreement ↑",
}  # key -> title; a private metric has its dotted name as both


# (name of the run, step) -> per cent, of the linear probe of its best block
Accuracies = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Line:
    """One line of a table; `values` has only measured values."""

    name: str
    step: int | None
    values: dict[str, Spread]
    images: int | None = None
    num_runs: int = 1
    group: int | None = None  # which colour; None: samples of no run here
    is_of_paper: bool = False


@dataclass(frozen=True)
class Table:
    """All results with one protocol."""

    protocol: Protocol
    lines: list[Line] = field(default_factory=list)
    is_thinned: bool = False

    @property
    def columns(self) -> dict[str, str]:
        """Key and title of every column that some line fills."""
        titles = {DISTANCE: f"{distance_name(self.protocol)} ↓", **METRICS}
        filled = dict.fromkeys(key for line in self.lines for key in line.values)
        return {key: titles.get(key, key) for key in [*titles, *sorted(filled.keys() - titles.keys())] if key in filled}

    @property
    def has_paper(self) -> bool:
        return any(line.is_of_paper for line in self.lines)


def results(
    groups: Sequence[SeedGroup], others: Sequence[OtherSamples], accuracies: Accuracies, thin: bool = True
) -> list[Table]:
    """One table per protocol, in the order of the runs; `thin` keeps a few steps per run."""
    rows = [row for group in groups for run in group.runs for row in run.evals] + [other.row for other in others]
    measured = [row for row in rows if _measured(row)]
    return [
        _table(protocol, groups, others, accuracies, thin) for protocol in dict.fromkeys(map(protocol_of, measured))
    ]


def _measured(row: Mapping[str, Any]) -> list[str]:
    """The metrics of an evaluation: those of METRICS, then private ones."""
    return [key for key in (DISTANCE, *METRICS, *filter(is_private, row)) if is_number(row.get(key))]


def unmatched_paper_rows(tables: Sequence[Table], groups: Sequence[SeedGroup]) -> list[tuple[RunRecord, Row]]:
    """Runs that match a row of the paper in training but not in evaluation: the paper's numbers are not shown for them."""
    beside = {line.group for table in tables if table.has_paper for line in table.lines}
    runs = [group.runs[0] for number, group in enumerate(groups) if number not in beside]
    return [(run, row) for run in runs if (row := paper_row_of(run)) is not None and row.unguided]


def _table(
    protocol: Protocol, groups: Sequence[SeedGroup], others: Sequence[OtherSamples], accuracies: Accuracies, thin: bool
) -> Table:
    lines, is_thinned = [], False
    for number, group in enumerate(groups):
        mine = _measured_lines(group, number, protocol, accuracies)
        if thin and len(mine) > MOST_STEPS:
            mine, is_thinned = layout.evenly_spaced(mine, MOST_STEPS), True
        lines += mine
        if mine:
            lines += _paper_lines(group, number, protocol)
    for other in others:
        if protocol_of(other.row) == protocol:
            values = {key: spread([other.row[key]]) for key in _measured(other.row)}
            lines.append(Line(other.name, other.row.get("step"), values))
    return Table(protocol, lines, is_thinned)


def _measured_lines(group: SeedGroup, number: int, protocol: Protocol, accuracies: Accuracies) -> list[Line]:
    """One line per step at which a run of the group was evaluated: means over the evaluated runs."""
    rows = [
        {**row, "accuracy": accuracies.get((run.name, row["step"]))}
        for run in group.runs
        for row in run.evals
        if protocol_of(row) == protocol
    ]
    lines = []
    for step in sorted({row["step"] for row in rows}):
        here = [row for row in rows if row["step"] == step]
        measured = dict.fromkeys(key for row in here for key in _measured(row))
        values = {key: spread([row[key] for row in here if is_number(row.get(key))]) for key in measured}
        if values.keys() - {"accuracy"}:
            lines.append(Line(group.name, step, values, here[0].get("images"), len(here), number))
    return lines


def _paper_lines(group: SeedGroup, number: int, protocol: Protocol) -> list[Line]:
    """The paper's numbers for a run that matches one of its rows in training and evaluation."""
    run, given = group.runs[0], settings_of(protocol)
    row = paper_row_of(run)
    if row is None or not _measured_as_in_the_paper(run, given):
        return []
    name = f"the paper’s {row.name} ({row.table})"
    figures = [each for each in row.figures if _sampled_as(each, given)]
    return [Line(name, each.step, _paper_values(each), group=number, is_of_paper=True) for each in figures]


def _measured_as_in_the_paper(run: RunRecord, given: Mapping[str, Any]) -> bool:
    asked = {
        "features": INCEPTION,
        "features_precision": None,  # papers measure in float32
        "num_samples": SAMPLES,
        "labels": "uniform",
        "weights": "ema",
        "decoder": AUTOENCODER,
        "reference": REFERENCE,
    }
    same_data = (run.data.get("num_images"), run.data.get("resolution")) == (IMAGES, 256)
    return same_data and all(given.get(key) == value for key, value in asked.items())


def _sampled_as(figures: PublishedResult, given: Mapping[str, Any]) -> bool:
    asked = figures.sampling
    asked["guidance"] = asked["guidance"] or "off"
    return figures.sampler != "" and all(given.get(key) == value for key, value in asked.items())


def _paper_values(figures: PublishedResult) -> dict[str, Spread]:
    """Our names of the paper's columns; the probe's accuracy is in per cent there too."""
    values = {DISTANCE: figures.fid, **{key: getattr(figures, key) for key in METRICS if hasattr(figures, key)}}
    return {key: spread([value]) for key, value in values.items() if value is not None}


def paper_row_of(run: RunRecord) -> Row | None:
    """The paper's row with the same network, alignment, batch size, latents and number of classes as the run; else None."""
    return next((row for row in ROWS.values() if _trains_as(run, row)), None)


def _trains_as(run: RunRecord, row: Row) -> bool:
    model, diffusion = run.config.get("model") or {}, run.config.get("diffusion") or {}
    # A setting that is missing from an older run's file has its default.
    network = ModelConfig(name=row.model, latent_size=row.resolution // FACTOR, num_classes=CLASSES)
    # How many channels the latents have is the data's, and not of the paper's tables.
    asked = network.model_dump(mode="json", exclude={"latent_channels"})
    same_network = {**asked, **model, "latent_channels": None} == {**asked, "latent_channels": None}
    objective = DiffusionConfig(objective=row.objective).model_dump(mode="json")
    same_objective = {**objective, "objective": "flow", **diffusion} == objective
    same_batch = run.config.get("batch_size") == 256
    return same_network and same_objective and same_batch and _same_alignment(run.alignments, row.alignment)


def _same_alignment(alignments: Sequence[Mapping[str, Any]], asked: Mapping[str, Any] | None) -> bool:
    """Whether the run has only the term of the row (or none), with the paper's projector and a constant weight."""
    if asked is None:
        return not alignments
    whole = AlignmentConfig(**asked).model_dump(mode="json")
    return len(alignments) == 1 and {**whole, **alignments[0]} == whole


TWO_DECIMALS = ("precision", "recall")  # shown with two decimals, as papers do


def write_markdown(
    out: Path, title: str, verdict: Verdict, tables: Sequence[Table], speedups: Sequence[SeedSpeedup],
    summary: Sequence[dict[str, str]],
) -> None:  # fmt: skip
    """What the page says in words and tables."""
    notes = "\n".join(f"- {in_markdown(note)}" for note in verdict.notes)
    parts = [f"# {in_markdown(title)}", f"**{in_markdown(verdict.sentence)}**", notes]
    for table in tables:
        heading = ["", "Iter.", *table.columns.values(), *(["runs"] if has_seeds(table) else [])]
        rows = [
            [line.name, "" if line.step is None else count(line.step), *(cell_text(line, key) for key in table.columns),
             *([str(line.num_runs)] if has_seeds(table) else [])]
            for line in table.lines
        ]  # fmt: skip
        parts += ["## Results", in_markdown(f"{how_made(table.protocol)}."), _markdown(heading, rows)]
    if speedups:
        cells = [speedup_cells(each) for each in speedups]
        rows = [list(each.values()) for each in cells]
        parts += ["## Speed-up at the baseline’s final distance", _markdown(list(cells[0]), rows)]
    parts += ["## Runs", _markdown(list(summary[0]), [list(row.values()) for row in summary])]
    files.write_text(out, "\n\n".join(part for part in parts if part) + "\n")


def write_csv(out: Path, tables: Sequence[Table]) -> None:
    """One row per line of the tables, every value with its spread and its protocol; unmeasured
    values are empty."""
    rows = [_csv_row(table, line) for table in tables for line in table.lines]
    columns = dict.fromkeys(
        ["name", "source", "iterations", "images", "num_runs", *(key for row in rows for key in row)]
    )
    # Figures first, how they were made after; sorting is stable.
    files.write_csv(out, rows, sorted(columns, key=lambda key: key in PROTOCOL and 1 + PROTOCOL.index(key)))


def has_seeds(table: Table) -> bool:
    return any(line.num_runs > 1 for line in table.lines)


def cell_text(line: Line, key: str) -> str:
    """A value as table text: the paper's with its own decimals, values over seeds with the standard deviation; else empty."""
    value = line.values.get(key)
    if value is None:
        return ""
    if line.is_of_paper:
        return printed(value.mean)
    text = with_deviation(value, "{:.2f}".format if key in TWO_DECIMALS else short_number)
    return text if value.num == line.num_runs else f"{text} ({value.num} of {line.num_runs})"


def speedup_cells(speedup: SeedSpeedup) -> dict[str, str]:
    """Heading -> cell: factors are means over pairs with their range, and present only if every run reached the distance."""
    pairs = speedup.pairs
    target = sum(pair.target for pair in pairs) / len(pairs)
    return {
        "aligned": speedup.aligned.label,
        "baseline": speedup.baseline.label,
        "its final distance": short_number(target),
        "reached": f"{len(speedup.reached)} of {len(pairs)}",
        **{f"times fewer {of}": _factor(speedup, of) for of in ("steps", "seconds", "images")},
    }


def _factor(speedup: SeedSpeedup, of: str) -> str:
    spread = speedup.factors(of)
    if spread is None:
        return ""
    least = "≥ " if speedup.is_bound else ""
    extent = f" ({spread.low:.2f} to {spread.high:.2f})" if spread.num > 1 else ""
    return f"{least}{spread.mean:.2f}{extent}"


def _csv_row(table: Table, line: Line) -> dict[str, Any]:
    source = "paper" if line.is_of_paper else "samples" if line.group is None else "run"
    row: dict[str, Any] = {"name": line.name, "source": source, "iterations": line.step, "images": line.images}
    row["num_runs"] = None if line.is_of_paper else line.num_runs
    for key, value in line.values.items():
        row[key] = value.mean
        if value.deviation is not None:
            row |= {f"{key}_deviation": value.deviation, f"{key}_low": value.low, f"{key}_high": value.high}
    return row | settings_of(table.protocol)


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(in_markdown(cell) for cell in line) + " |" for line in lines)
