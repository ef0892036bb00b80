"""The report's tables as Markdown and as CSV, next to the page."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from repa.base import files
from repa.recipes.paper_tables import printed
from repa.report.headline import Verdict
from repa.report.results import Line, Table
from repa.report.runs import PROTOCOL, settings_of
from repa.report.speedups import GroupSpeedup
from repa.report.text import count, figure, how_made, with_deviation

COUNTED = ("precision", "recall")  # shown with two decimals, as papers do


def write_markdown(
    out: Path, title: str, verdict: Verdict, tables: Sequence[Table], speedups: Sequence[GroupSpeedup],
    summary: Sequence[dict[str, str]],
) -> None:  # fmt: skip
    """What the page says in words and tables."""
    parts = [
        f"# {_plain(title)}",
        f"**{_plain(verdict.sentence)}**",
        "\n".join(f"- {_plain(n)}" for n in verdict.notes),
    ]
    for table in tables:
        heading = ["", "Iter.", *table.columns.values(), *(["runs"] if has_seeds(table) else [])]
        rows = [
            [line.name, "" if line.step is None else count(line.step), *(shown(line, key) for key in table.columns),
             *([str(line.num_runs)] if has_seeds(table) else [])]
            for line in table.lines
        ]  # fmt: skip
        parts += ["## Results", _plain(f"{how_made(table.protocol)}."), _markdown(heading, rows)]
    if speedups:
        cells = [speedup_cells(each) for each in speedups]
        parts += [
            "## Speed-up at the baseline’s final distance",
            _markdown(list(cells[0]), [list(each.values()) for each in cells]),
        ]
    parts += ["## Runs", _markdown(list(summary[0]), [list(row.values()) for row in summary])]
    files.write_text(out, "\n\n".join(part for part in parts if part) + "\n")


def write_csv(out: Path, tables: Sequence[Table]) -> None:
    """One row a line of the tables, every figure with its spread and the settings that it was measured by; what was not
    measured is empty."""
    rows = [_csv_row(table, line) for table in tables for line in table.lines]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    fixed = ["name", "source", "iterations", "images", "num_runs"]
    columns = (
        fixed
        + sorted(set(columns) - set(fixed) - set(PROTOCOL), key=columns.index)
        + [c for c in PROTOCOL if c in columns]
    )
    files.write_csv(out, rows, columns)


def has_seeds(table: Table) -> bool:
    return any(line.num_runs > 1 for line in table.lines)


def shown(line: Line, key: str) -> str:
    """A figure as a table has it: the paper's with its own decimals, over seeds with the standard deviation; else empty."""
    found = line.values.get(key)
    if found is None:
        return ""
    if line.is_of_paper:
        return printed(found.mean)
    text = with_deviation(found, "{:.2f}".format if key in COUNTED else figure)
    return text if found.num == line.num_runs else f"{text} ({found.num} of {line.num_runs})"


def speedup_cells(found: GroupSpeedup) -> dict[str, str]:
    """Heading -> cell: factors are means over pairs with their range, and only there when every run got there."""
    pairs = found.pairs
    target = sum(pair.target for pair in pairs) / len(pairs)
    return {
        "aligned": found.aligned.label,
        "baseline": found.baseline.label,
        "its final distance": figure(target),
        "reached": f"{len(found.reached)} of {len(pairs)}",
        **{f"times fewer {of}": _factor(found, of) for of in ("steps", "seconds", "images")},
    }


def _factor(found: GroupSpeedup, of: str) -> str:
    spread = found.factors(of)
    if spread is None:
        return ""
    least = "≥ " if found.is_bound else ""
    extent = f" ({spread.low:.2f} to {spread.high:.2f})" if spread.num > 1 else ""
    return f"{least}{spread.mean:.2f}{extent}"


def _csv_row(table: Table, line: Line) -> dict[str, Any]:
    source = "paper" if line.is_of_paper else "samples" if line.group is None else "run"
    row: dict[str, Any] = {"name": line.name, "source": source, "iterations": line.step, "images": line.images}
    row["num_runs"] = None if line.is_of_paper else line.num_runs
    for key, found in line.values.items():
        row[key] = found.mean
        if found.deviation is not None:
            row |= {f"{key}_deviation": found.deviation, f"{key}_low": found.low, f"{key}_high": found.high}
    return row | settings_of(table.protocol)


def _markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: a name may hold a bar, a star or a tag."""
    for letter in "\\|*_<>`[]":
        text = text.replace(letter, f"\\{letter}")
    return text.replace("\n", " ")
