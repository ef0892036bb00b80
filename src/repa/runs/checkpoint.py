"""Checkpoints: a folder that is whole or absent, with a checksum for every file in it."""

import pickle
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError
from repa.runs import layout


class Checkpoint(NamedTuple):
    """Everything that must survive a restart. Randomness and data order are functions of (seed, step), so they are not in here."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    projectors: dict[str, Tensor]
    optimizer: dict[str, Any]
    counters: dict[str, float]  # training seconds and the like


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int = 0) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep` (0 keeps every one)."""
    folder = layout.checkpoint_folder(run, checkpoint.step)
    if folder.exists():  # the same step again: a run continued from here and came back with the same state
        return folder
    for leftover in folder.parent.glob(".*.tmp"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover)
    with files.atomic_folder(folder) as temporary:
        for name in (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE):
            tensors = getattr(checkpoint, name.removesuffix(".safetensors"))
            save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, temporary / name)
        torch.save(checkpoint.optimizer, temporary / layout.OPTIMIZER_FILE)
        checksums = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
        files.write_json(
            temporary / layout.STATE_FILE,
            {"step": checkpoint.step, "counters": checkpoint.counters, "sha256": checksums},
        )
    if keep:
        for step in layout.checkpoint_steps(run)[:-keep]:
            shutil.rmtree(layout.checkpoint_folder(run, step))
    return folder


def load_checkpoint(run: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint of `step` (default: the highest), on the CPU; None when the run has none yet."""
    steps = layout.checkpoint_steps(run)
    if step is None:
        if not steps:
            return None
        step = steps[-1]
    folder = _whole(run, step)
    state = files.read_json(folder / layout.STATE_FILE)
    tensors = [load_file(folder / name) for name in (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE)]
    try:
        optimizer = torch.load(folder / layout.OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{folder / layout.OPTIMIZER_FILE} is refused: it holds more than tensors ({reason})."
        ) from None
    return Checkpoint(state["step"], *tensors, optimizer, state["counters"])


def load_weights(run: Path, weights: str, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """(step, state dict) of the network alone: `weights` is "ema" or "model"."""
    if weights not in ("ema", "model"):
        raise UserError(f"Weights {weights!r} do not exist in a checkpoint: choose 'ema' or 'model'.")
    steps = layout.checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: train it first (repa train ... --out {run}).")
    step = steps[-1] if step is None else step
    folder = _whole(run, step, only=f"{weights}.safetensors")
    return step, load_file(folder / f"{weights}.safetensors")


def _whole(run: Path, step: int, only: str | None = None) -> Path:
    """The folder of a checkpoint whose files have the bytes that were written; UserError names the first that has not."""
    steps = layout.checkpoint_steps(run)
    folder = layout.checkpoint_folder(run, step)
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, steps)) or 'none'}.")
    state = files.read_json(folder / layout.STATE_FILE)
    for name, checksum in state["sha256"].items():
        if only in (None, name) and (not (folder / name).is_file() or files.sha256(folder / name) != checksum):
            before = [s for s in steps if s < step]
            continuing = f"the run continues from step {before[-1]}" if before else "the run starts again from step 0"
            raise UserError(
                f"{folder / name} is damaged: its bytes are not the ones that were written. Remove {folder} and {continuing}."
            )
    return folder
