"""`repa report RUN... --out report.html`."""

from pathlib import Path

from repa.cli import options
from repa.cli.console import say


class ReportArguments(options.Command):
    """Compare runs on one self-contained HTML page: tables as in the paper, speed-up, curves, samples from the same
    noise. Also writes the tables as .md and .csv. Name the baseline first. Runs that differ only in the seed form one
    group.
    """

    verb = "report"
    positional = ("runs...",)

    runs: options.RunFolders
    """run folders, the baseline first"""
    out: str = "report.html"
    """Name of the page; .md and .csv are written beside it."""
    results: tuple[str, ...] = ()
    """Files of `repa evaluate --out` in addition to those in the runs' folders evaluations/, also of published samples."""
    names: tuple[str, ...] = ()
    """Names of the runs on the page; empty: their folders."""
    picture: str = ""
    """Name of a .png for a README: samples during training, one row per run, beside the distances; empty: none."""
    title: str = "Representation alignment: comparison of runs"
    """Title of the page."""


def main(argv: list[str]) -> int:
    given = options.parse(ReportArguments, argv)
    out = options.file_of("--out", given.out, ".html")
    if given.picture:
        options.file_of("--picture", given.picture, ".png")
    from repa.base import files, lock
    from repa.report import save_figure, write_report

    if given.picture:
        files.require_writable(given.picture)
    # Two calls at once would mix their pages and tables.
    with lock.exclusive(out, "repa report"):
        files.require_replaceable(out, beside=(".md", ".csv"))
        files.remove_leftovers(out.parent, [out.with_suffix(ending).name for ending in (".md", ".csv")].__contains__)
        write_report(
            given.runs, out, title=given.title, names=list(given.names) or None, results=given.results, tables=True
        )
    if given.picture:
        with lock.exclusive(Path(given.picture), "repa report"):
            save_figure(given.runs, given.picture, list(given.names) or None)
    say(f"{out}: open it in a browser. The tables are also in {out.with_suffix('.md')} and {out.with_suffix('.csv')}.")
    return 0
