"""`repa export RUN OUT [--format safetensors|diffusers]`."""

from pathlib import Path
from typing import Literal

from repa.cli import options
from repa.cli.console import say


class ExportArguments(options.OneCheckpoint):
    """Write the averaged network of a run into a new folder with a configuration and a model card: safetensors for
    repa.models.load_exported, or weights for diffusers' DiTTransformer2DModel.
    """

    verb = "export"
    positional = ("run", "out")

    run: options.RunFolder
    """run folder"""
    out: str
    """folder to make"""
    format: Literal["safetensors", "diffusers"] = "safetensors"
    """safetensors for repa, or diffusers' layout."""


def main(argv: list[str]) -> int:
    given = options.parse(ExportArguments, argv)
    from repa.runs.export import export_run

    step = export_run(Path(given.run), Path(given.out), given.format, given.step)
    say(f"{given.out}: the EMA weights of step {step:,} as {given.format}; its README.md shows how to load them.")
    return 0
