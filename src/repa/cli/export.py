"""`repa export RUN OUT [--format safetensors|diffusers]`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from repa.cli import options
from repa.cli.console import say


class ExportArguments(options.Command):
    """Write the averaged network of a run into a new folder with a configuration and a model card: safetensors for
    repa.models.load_exported, or weights for DiTTransformer2DModel of diffusers.
    """

    verb = "export"
    positional = ("run", "out")

    run: str
    """run folder"""
    out: str
    """folder to make"""
    format: Literal["safetensors", "diffusers"] = "safetensors"
    """Who reads it."""
    checkpoint: int = Field(-1, ge=-1)
    """Step of the checkpoint; -1 takes the newest."""


def main(argv: list[str]) -> int:
    given = options.parse(ExportArguments, argv)
    from repa.runs.export import export_run

    step = export_run(
        Path(given.run), Path(given.out), given.format, None if given.checkpoint < 0 else given.checkpoint
    )
    say(f"{given.out}: the EMA weights of step {step:,} as {given.format}; README.md there says how to load them.")
    return 0
