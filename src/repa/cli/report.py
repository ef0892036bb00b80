"""`repa report RUN... --out report.html`."""

from pathlib import Path

from repa.base.config import Config
from repa.cli import options
from repa.cli.console import say

ABOUT = "One self-contained HTML page that compares runs: curves, distances, samples from the same noise. First the baseline."


class ReportArguments(Config):
    runs: tuple[str, ...]
    """run folders, the baseline first"""
    out: str = "report.html"
    """Name of the page."""
    names: tuple[str, ...] = ()
    """Names of the runs on the page; empty takes their folders'."""
    title: str = "Representation alignment: runs compared"
    """Title of the page."""


def main(argv: list[str]) -> int:
    given = options.parse(ReportArguments, argv, verb="report", about=ABOUT, positional=("runs...",))
    from repa.report import write_report

    out = write_report(
        [Path(run) for run in given.runs], Path(given.out), title=given.title, names=list(given.names) or None
    )
    say(f"{out}: open it in a browser.")
    return 0
