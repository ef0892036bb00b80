"""The name of every file in a run folder, in one place.

RUN/
  config.yaml                 the resolved training configuration; itself accepted as a recipe
  data.json                   what the run was trained on: source, counts, class names, who encoded it
  metrics.jsonl               one JSON object a line: kind "train" (losses, rate) or "eval" (metrics of samples)
  log.txt                     when it started and continued, and a line for every logged step
  checkpoints/0001000/        model, ema, projectors (safetensors), optimizer.pt, state.json
  samples/0001000.npz, .png   previews: uint8 NHWC under arr_0, and the grid of them
  report.html
  converted.json              in a folder that `repa convert` made: what it was made from
"""

from pathlib import Path
from typing import Any

import yaml

from repa.base.errors import UserError

CONFIG = "config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
ORIGIN = "converted.json"

MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
PROJECTORS_FILE = "projectors.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"  # step, counters and the checksum of every other file


def step_name(step: int) -> str:
    return f"{step:07d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / step_name(step)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending: a folder gets its name only once it is whole."""
    folder = run / CHECKPOINTS
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []


def preview(run: Path, step: int, suffix: str) -> Path:
    return run / SAMPLES / f"{step_name(step)}{suffix}"


def preview_steps(run: Path) -> list[int]:
    folder = run / SAMPLES
    return sorted(int(p.stem) for p in folder.glob("*.npz") if p.stem.isdigit()) if folder.is_dir() else []


def read_config(run: Path) -> dict[str, Any]:
    """The resolved configuration of a run as plain values."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG}. Give the --out folder of a `repa train`.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings, but holds {type(values).__name__}.")
    return values
