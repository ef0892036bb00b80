"""Averages of any width after training: power-function profiles and their least squares (EDM2, arXiv 2312.02696, section 3).

A profile of exponent gamma at step t weights the network of step tau <= t by (gamma + 1) tau^gamma / t^(gamma + 1). Its
relative width is its standard deviation as a share of t.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError
from repa.runs import layout
from repa.runs.checkpoint import load_checked, load_weights, save_checked

WIDEST = 0.28  # of relative widths; gamma is 0 at 1 / sqrt(12) = 0.2887, a plain mean of all steps
Profile = tuple[float, float]  # (step, gamma)


def gamma_of(width: float) -> float:
    """The exponent of a relative width: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2, a cubic equation in gamma."""
    if not 0 < width <= WIDEST:
        raise UserError(f"The relative width of an average is above 0 and at most {WIDEST}, but got {width:g}.")
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def weights_name(width: float) -> str:
    """The stem of the files that hold an average of this width; `repa sample --weights` takes it."""
    return f"ema-width-{width:g}"


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    (earlier, g), (later, h) = sorted((a, b))
    return (g + 1) * (h + 1) / (g + h + 1) * (earlier / later) ** h / later


def mixture(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients (S,) that make the stored profiles come closest to the wanted one in the least squares."""
    products = np.array([[inner(a, b) for b in stored] for a in stored])
    target = np.array([inner(a, wanted) for a in stored])
    # Profiles of length 1: the steps span decades, and so would the entries of the matrix.
    scale = 1.0 / np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products * np.outer(scale, scale), target * scale, rcond=None)[0]
    return solution * scale


def save_snapshot(run: Path, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
    """Keep the averages (width -> parameters) of a step in half precision, whole or not at all; the same step only once."""
    folder = layout.snapshot_folder(run, step)
    if folder.exists():
        return
    files.remove_leftovers(folder.parent)  # of a process that was killed while it wrote
    with files.atomic_folder(folder) as temporary:
        for width, state in averages.items():
            half = {name: value.half() for name, value in state.items()}
            save_checked(half, temporary / f"{weights_name(width)}.safetensors")


def drop_snapshots(run: Path, step: int) -> None:
    """Remove those after `step`: their steps will be done again, perhaps with another end of the schedule."""
    for later in layout.snapshot_steps(run):
        if later > step:
            folder = layout.snapshot_folder(run, later)
            # Out of the way first; what somebody has open on NFS cannot go, and the next snapshot tries again.
            hidden = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent)
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def reconstruct(run: Path, width: float, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The average of a relative width at a step (None: that of the last snapshot), from the snapshots up to it.

    Returns:
        (step, parameters in float32); sums are float64.

    Raises:
        UserError: no snapshots, none of that step, or a width that no average has.
    """
    gamma_of(width)  # an impossible width is reported first
    steps = layout.snapshot_steps(run)
    if not steps:
        raise UserError(
            f"{run} has no snapshots to average: train with --ema-widths 0.05 0.1 and --snapshot-every, then ask again."
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{run} has no snapshot of step {step}: there are {', '.join(map(str, steps))}.")
    paths = [path for s in steps if s <= step for path in sorted(layout.snapshot_folder(run, s).glob("*.safetensors"))]
    profiles = [(float(path.parent.name), gamma_of(float(path.stem.rpartition("-")[2]))) for path in paths]
    # Coefficients of neighbouring snapshots are large and of opposite signs: float64, or their sum would lose digits.
    total: dict[str, Tensor] = {}
    for path, share in zip(paths, mixture(profiles, (float(step), gamma_of(width))), strict=True):
        for name, value in load_checked(path, f"Remove {path.parent} to average without it.").items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + float(share) * value.double()
    return step, {name: value.float() for name, value in total.items()}


def write_average(run: Path, width: float, step: int | None = None) -> tuple[int, str]:
    """Write what `reconstruct` gives next to the checkpoints; returns its step and the name that `load_run` knows it by."""
    step, parameters = reconstruct(run, width, step)
    # Snapshots hold what is trained; positions and the like come from a checkpoint.
    _, state = load_weights(run, "ema")
    name = weights_name(width)
    with files.atomic_path(layout.average_file(run, step, name)) as temporary:
        save_checked({**state, **parameters}, temporary)
    return step, name
