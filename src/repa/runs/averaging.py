"""Post-hoc averages of any width: least-squares fits of power-function profiles (EDM2, arXiv 2312.02696, section 3).

A profile of exponent gamma at step t weights the network of step tau <= t by (gamma + 1) tau^gamma / t^(gamma + 1). Its
relative width is its standard deviation divided by t.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError, listed
from repa.runs import layout
from repa.runs.checkpoint import load_checked, load_weights, save_checked

WIDEST = 0.28  # largest relative width; gamma is 0 at 1 / sqrt(12) = 0.2887, the plain mean of all steps
MOST_NAMED = 20  # unusable snapshots in an error
Profile = tuple[float, float]  # (step, gamma)


def gamma_of(width: float) -> float:
    """Exponent of a relative width: the root of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = width^2, a cubic in gamma."""
    if not 0 < width <= WIDEST:
        raise UserError(f"The relative width of an average must be above 0 and at most {WIDEST}, but got {width:g}.")
    inverse = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def weights_name(width: float) -> str:
    """File stem of an average of this width; also its name for `repa sample --weights`."""
    return f"ema-width-{width:g}"


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles."""
    (earlier, g), (later, h) = sorted((a, b))
    return (g + 1) * (h + 1) / (g + h + 1) * (earlier / later) ** h / later


def mixture(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients (S,) of the least-squares fit of the wanted profile by the S stored ones."""
    products = np.array([[inner(a, b) for b in stored] for a in stored])
    target = np.array([inner(a, wanted) for a in stored])
    # Profiles are normalised to length 1: steps span decades, and so would the entries of the matrix.
    scale = 1.0 / np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products * np.outer(scale, scale), target * scale, rcond=None)[0]
    return solution * scale


def save_snapshot(run: Path, step: int, averages: dict[float, dict[str, Tensor]], settings: Mapping[str, str]) -> None:
    """Save the averages (width -> parameters) of a step in float16, atomically; an existing snapshot is kept.

    `settings` are the `layout.fixed_settings` of the run: snapshots of another run would give a wrong average.
    """
    folder = layout.snapshot_folder(run, step)
    if folder.exists():
        return
    files.remove_leftovers(folder.parent)  # of a process that was killed during writing
    with files.atomic_folder(folder) as temporary:
        for width, state in averages.items():
            half = {name: value.half() for name, value in state.items()}
            save_checked(half, temporary / f"{weights_name(width)}.safetensors", settings)


def drop_later(run: Path, step: int) -> None:
    """Remove the snapshots after `step`, and the averages of them: training repeats these steps, perhaps with other settings."""
    for folder in (*layout.folders_of_steps(run / layout.SNAPSHOTS), *layout.folders_of_steps(run / layout.AVERAGES)):
        if int(folder.name) > step:
            files.remove_folder(folder)
            if folder.exists():
                raise UserError(
                    f"{folder} is of a step that training repeats: remove it, then run the same command again."
                )


def reconstruct(run: Path, width: float, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The average of a relative width at a step (None: the last snapshot's), from the snapshots up to that step.

    Returns:
        (step, parameters in float32); sums are computed in float64.

    Raises:
        UserError: no snapshots, no snapshot of that step, or an impossible width.
    """
    gamma_of(width)  # an impossible width is reported first
    steps = layout.snapshot_steps(run)
    if not steps:
        raise UserError(f"{run} has no snapshots to average: train with --ema-widths 0.05 0.1 and --snapshot-every.")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{run} has no snapshot of step {step}: there are {', '.join(map(str, steps))}.")
    paths = [path for s in steps if s <= step for path in sorted(layout.snapshot_folder(run, s).glob("*.safetensors"))]
    profiles = [(float(path.parent.name), gamma_of(float(path.stem.rpartition("-")[2]))) for path in paths]
    # Coefficients of neighbouring snapshots are large and of opposite signs, so their sum in float32 would lose digits.
    total: dict[str, Tensor] = {}
    refused: dict[str, UserError] = {}  # folder -> why
    for path, share in zip(paths, mixture(profiles, (float(step), gamma_of(width))), strict=True):
        try:
            found = load_checked(run, path, "")
        except UserError as error:  # all are named together: removing them one by one would take a command each
            refused.setdefault(str(path.parent), error)
            continue
        for name, value in found.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + float(share) * value.double()
    if refused:
        first, *others = refused.values()
        also = f" {len(others)} more cannot be averaged either." if others else ""
        folders = list(refused)
        if len(folders) > MOST_NAMED:
            folders[MOST_NAMED:] = [f"{len(folders) - MOST_NAMED} more"]
        raise UserError(f"{str(first).rstrip()}{also} Remove {listed(folders, 'and')} to average without them.")
    return step, {name: value.float() for name, value in total.items()}


def write_average(run: Path, width: float, step: int | None = None) -> tuple[int, str]:
    """Write the average of `reconstruct` to the run folder; returns its step and its name for `load_run`."""
    step, parameters = reconstruct(run, width, step)
    # Snapshots hold trained parameters only; buffers such as positions come from a checkpoint.
    _, state = load_weights(run, "ema")
    name = weights_name(width)
    with files.atomic_path(layout.average_file(run, step, name)) as temporary:
        save_checked({**state, **parameters}, temporary, layout.fixed_settings(layout.read_config(run)))
    return step, name
