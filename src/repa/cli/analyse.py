"""`repa analyse cknna|probe RUN --data DATA ...`."""

from pathlib import Path
from typing import Literal

from repa.analysis.config import AnalyseConfig
from repa.base import files
from repa.cli import options
from repa.cli.console import Progress, say

ABOUT = (
    "What the hidden states of a run know. cknna: how alike their neighbourhoods are to an encoder's. "
    "probe: accuracy of a linear classifier on them. Both for every depth and noise level asked for."
)


class AnalyseArguments(AnalyseConfig):
    what: Literal["cknna", "probe"]
    """cknna or probe"""
    run: str
    """run folder"""
    data: str
    """Folder of prepared data."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights or the raw ones."""
    out: str = ""
    """Name of a .json for the rows; empty only prints them."""


def main(argv: list[str]) -> int:
    given = options.parse(AnalyseArguments, argv, verb="analyse", about=ABOUT, positional=("what", "run"))
    config = options.part(AnalyseConfig, given)
    from repa.analysis import cknna_of_run, probe_of_run
    from repa.base import dist
    from repa.data import open_data
    from repa.runs import load_run

    run = load_run(given.run, given.weights, device=dist.setup())
    job = {"cknna": cknna_of_run, "probe": probe_of_run}[given.what]
    with Progress(f"hidden states of {given.run}", "images") as bar:
        rows = job(run, open_data(Path(given.data)), config, bar)
    if given.out:
        files.write_json(
            given.out, {"run": given.run, "step": run.step, **config.model_dump(mode="json"), "rows": rows}
        )
    say("    t  depth  " + ("CKNNA" if given.what == "cknna" else "top-1 accuracy"))
    for row in rows:
        t, depth, value = row.values()
        say(f"{t:5.2f}  {depth:5d}  {value:.4f}")
    return 0
