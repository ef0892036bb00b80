"""The checkpoints that an analysis of runs looks at, by name, folder and step; and how one is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from repa.base.errors import UserError
from repa.runs import layout

if TYPE_CHECKING:
    import torch

    from repa.runs import LoadedRun


class RunCheckpoint(NamedTuple):
    """One network of a run."""

    label: str  # the run's folder name, or its path where several have that name
    run: Path
    step: int

    def load(self, weights: str, autoencoder_weights: str, device: "torch.device | str") -> "LoadedRun":
        """The network with these weights: averaged (ema), raw (model), or another average by its name."""
        from repa.runs import load_run

        return load_run(self.run, weights, step=self.step, autoencoder_weights=autoencoder_weights, device=device)


def checkpoints_of(runs: Sequence[str | Path], steps: Sequence[int] = (), most: int = 1) -> list[RunCheckpoint]:
    """The checkpoints of these steps of every run; without steps at most `most` of each, evenly spaced, the newest included.

    Raises:
        UserError: a folder is not a run, or has none of the checkpoints asked for.
    """
    names = [Path(run).resolve().name for run in runs]
    labels = [name if names.count(name) == 1 else str(run) for run, name in zip(runs, names, strict=True)]
    return [
        RunCheckpoint(label, Path(run), step)
        for run, label in zip(runs, labels, strict=True)
        for step in _steps_of(Path(run), steps, most)
    ]


def _steps_of(run: Path, asked: Sequence[int], most: int) -> Sequence[int]:
    layout.read_config(run)
    steps = layout.checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: train it first (repa train ... --out {run}).")
    if missing := [step for step in asked if step not in steps]:
        raise UserError(f"{run} has no checkpoint of step {missing[0]}: there are {', '.join(map(str, steps))}.")
    return asked or layout.evenly_spaced(steps, most)
