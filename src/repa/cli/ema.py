"""`repa ema RUN --width W`."""

from pathlib import Path

from pydantic import Field

from repa.cli import options
from repa.cli.console import say


class EmaArguments(options.Command):
    """Compute an average of a run's weights of any width after training, from its snapshots (train with --ema-widths
    0.05 0.1 and --snapshot-every). The width is the standard deviation of the averaged steps relative to all steps.
    """

    verb = "ema"
    positional = ("run",)

    run: options.RunFolder
    """run folder"""
    width: float = Field(gt=0, le=0.28)
    """Relative width, such as 0.05 (short) or 0.2 (long)."""
    step: int = Field(-1, ge=-1)
    """Step of the last snapshot; -1: the newest."""


def main(argv: list[str]) -> int:
    given = options.parse(EmaArguments, argv)
    from repa.base import files, lock
    from repa.runs import layout
    from repa.runs.averaging import write_average

    files.refuse_links(Path(given.run))
    averages = Path(given.run) / layout.AVERAGES
    with lock.exclusive(averages, "repa ema"):
        for folder in averages.glob("*"):
            files.remove_leftovers(folder)
        step, name = write_average(Path(given.run), given.width, None if given.step < 0 else given.step)
    say(
        f"{given.run}: computed the weights {name} at step {step:,}. "
        f"Next: repa sample {given.run} --weights {name} --num-images 64 --out samples.npz"
    )
    return 0
