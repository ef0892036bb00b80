"""Tables for people and programs: aligned columns on the terminal, .json with the settings, .csv beside it."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from repa.base import files, launch, lock
from repa.base.config import Config
from repa.base.errors import printable
from repa.base.reporting import columns
from repa.cli import options
from repa.cli.console import speaks
from repa.runs import layout

Rows = Sequence[dict[str, Any]]


def in_columns(rows: Rows, titles: dict[str, str]) -> list[str]:
    """Lines of aligned columns; `titles` is the key of a row and the title with an optional format, as in "top-1|.4f"."""
    heads = [title.partition("|")[0] for title in titles.values()]
    cells = [[_shown(row.get(key), title.partition("|")[2]) for key, title in titles.items()] for row in rows]
    numbers = [i for i, key in enumerate(titles) if not any(isinstance(row.get(key), str) for row in rows)]
    return columns([heads, *cells], right=numbers)


def _shown(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return printable(value) if isinstance(value, str) else format(value, form)


def how(what: str, given: Config) -> dict[str, Any]:
    """The settings that a file records: the analysis, the options, the version."""
    from repa import __version__

    # The location of files does not change the rows.
    return {"analysis": what, **given.model_dump(mode="json", exclude={"out", "cache"}), "repa": __version__}


def write(out: Path, how: dict[str, Any], rows: Rows) -> None:
    """Write `out` (.json) with `how` and the rows, and the rows as .csv beside it, in the main process.

    NaN (an undefined measure) becomes null and an empty cell, because JSON has no NaN.
    """
    rows = [{key: None if value != value else value for key, value in row.items()} for row in rows]
    if speaks():
        files.write_sealed(out, {**how, "rows": rows})
        files.write_csv(out.with_suffix(".csv"), rows)


def output(held: ExitStack, given: str, default: Path, suffix: str = ".json") -> Path:
    """The output file: --out, or the default; refuses another suffix or an unwritable path before any work.

    `held` keeps its lock until the command ends.
    """
    out = options.file_of("--out", given or default, suffix)
    if not given and default.parent.name == layout.ANALYSIS:
        files.refuse_links(default.parent.parent)
    files.require_writable(out)
    if suffix == ".json":
        files.require_replaceable(out, ("analysis", "rows"), (".csv", ".png"))
    if launch.place().rank == 0:
        held.enter_context(lock.exclusive(out, "repa analyse"))
        for beside in (".json", ".csv", ".png"):
            files.remove_leftovers(out.parent, out.with_suffix(beside).name.__eq__)
    return out
