"""`repa evaluate SAMPLES --reference DATA ...`."""

from pathlib import Path

from repa.base import files
from repa.base.errors import UserError
from repa.cli import options
from repa.cli.console import Progress, say
from repa.evaluation.config import EvaluateConfig

ABOUT = "Measure samples (.npz with arr_0) against prepared data, in the pooled features of an encoder."


class EvaluateArguments(EvaluateConfig):
    samples: str
    """.npz of samples"""
    reference: str
    """Folder of prepared data."""
    out: str = ""
    """Name of a .json for the results; empty only prints them."""


def main(argv: list[str]) -> int:
    given = options.parse(EvaluateArguments, argv, verb="evaluate", about=ABOUT, positional=("samples",))
    config = options.part(EvaluateConfig, given)
    from repa.base import dist
    from repa.data import open_data
    from repa.evaluation import evaluate_file

    device = dist.setup()
    if dist.active():
        raise UserError("`repa evaluate` runs in one process: start it without torchrun.")
    with Progress(f"reading {given.samples}", "images") as bar:
        results = evaluate_file(
            Path(given.samples), open_data(Path(given.reference)), config, device=device, progress=bar
        )
    if given.out:
        files.write_json(given.out, results)
    for name, value in results["metrics"].items():
        say(f"{name:<20} {value:.4f}")
    say(
        f"in the features of {config.features}, {results['num_samples']:,} samples against {results['num_reference']:,} images"
    )
    return 0
