"""Checkpoints: a folder that is whole or absent, with a checksum for every file in it."""

import errno
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa.base import files
from repa.base.errors import UserError
from repa.runs import layout

MARGIN = 2**20  # bytes: a write that failed with less than this free failed for want of room


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
            tensors = {key: value.detach().contiguous().cpu() for key, value in tensors.items()}
            _write(temporary / name, lambda path, tensors=tensors: save_file(tensors, path))
        _write(temporary / layout.OPTIMIZER_FILE, lambda path: torch.save(checkpoint.optimizer, path))
        checksums = {path.name: files.sha256(path) for path in sorted(temporary.iterdir())}
        files.write_json(
            temporary / layout.STATE_FILE,
            {"step": checkpoint.step, "counters": checkpoint.counters, "sha256": checksums},
        )
    if keep:
        for step in layout.checkpoint_steps(run)[:-keep]:
            shutil.rmtree(layout.checkpoint_folder(run, step))
    return folder


def _write(path: Path, write: Callable[[Path], None]) -> None:
    """Run a library's writer; torch and safetensors report a full disk as errors of their own."""
    try:
        write(path)
    except (RuntimeError, SafetensorError) as error:
        if shutil.disk_usage(path.parent).free < MARGIN or "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


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
    state = load_file(folder / f"{weights}.safetensors")
    if not state:  # of a converted run
        raise UserError(
            f"{folder} has no {weights!r} weights: it was converted from a file that holds the other ones only."
        )
    return step, state


def _whole(run: Path, step: int, only: str | None = None) -> Path:
    """The folder of a checkpoint whose files have the bytes that were written; UserError names the first that has not."""
    steps = layout.checkpoint_steps(run)
    folder = layout.checkpoint_folder(run, step)
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, steps)) or 'none'}.")
    before = [s for s in steps if s < step]
    remedy = (
        f"Remove {folder} and the run {f'continues from step {before[-1]}' if before else 'starts again from step 0'}."
    )
    try:
        checksums = files.read_json(folder / layout.STATE_FILE)["sha256"]
    except (UserError, KeyError, TypeError):
        raise UserError(f"{folder / layout.STATE_FILE} is damaged: it is not what was written. {remedy}") from None
    for name, checksum in checksums.items():
        if only in (None, name) and (not (folder / name).is_file() or files.sha256(folder / name) != checksum):
            raise UserError(f"{folder / name} is damaged: its bytes are not the ones that were written. {remedy}")
    return folder
