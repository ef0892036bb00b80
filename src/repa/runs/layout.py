"""The name of every file in a run folder, in one place; its configuration, and where a converted run came from. Torch-free.

RUN/
  config.yaml                 the resolved training configuration; itself accepted as a recipe
  data.json                   what the run was trained on: source, counts, class names, who encoded it
  metrics.jsonl               one JSON object a line: kind "train" (losses, rate) or "eval" (metrics of samples)
  log.txt                     when it started and continued, and a line for every logged step
  checkpoints/0001000/        model, ema, projectors, optimizer (safetensors, large ones in parts), state.json
  snapshots/0001000/          averages of power-function profiles in half precision, for `repa ema`
  averages/0001000/           what `repa ema` made of them, by width
  samples/0001000.npz, .png   previews: uint8 NHWC under arr_0 and their labels, and the grid of them
  evaluations/*.json          results of `repa evaluate` that belong in the report
  analysis/                   what `repa analyse` found: rows (.json, .csv), pictures, and its cache
  report.html
  converted.json              in a folder that `repa convert` made: what it was made from, and whose code that was
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from repa.base import files
from repa.base.config import leaves, read_yaml
from repa.base.errors import UserError, listed

CONFIG = "config.yaml"
DATA = "data.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
AVERAGES = "averages"
SAMPLES = "samples"
EVALUATIONS = "evaluations"
ANALYSIS = "analysis"
ORIGIN = "converted.json"
WANDB_ID = "wandb/id.txt"  # of its run at Weights & Biases, which is next to it

# Settings that say how long to train, what to write and how to compute, not what to compute. accumulate, parallel,
# checkpoint_activations and compile change sums in their last digits only, as another number of processes does.
CHANGEABLE = (
    "num_steps", "epochs", "accumulate", "parallel", "checkpoint_activations", "compile", "compile_scope", "max_skipped_steps",
    "log_every", "save_every", "save_minutes", "keep_checkpoints", "keep_every", "async_save", "snapshot_every",
    "preview", "wandb", "autoencoder_weights", "feature_weights", "text_weights",
)  # fmt: skip
# Types of settings that are read as plain values: a folder may come from anyone.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("model", "diffusion", "optimizer", "preview"), dict[str, Any]),
    **dict.fromkeys(("alignments", "streams"), list[dict[str, Any]]),
    **dict.fromkeys(("autoencoder", "autoencoder_weights", "text", "text_weights"), str),
    "feature_weights": list[str],
    "label_dropout": Annotated[float, Field(ge=0, le=1)],
}

FEW = 4  # runs within a folder that a sentence names
WEIGHTS = ".safetensors"
PART_OF = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
PROJECTORS_FILE = "projectors.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"  # step, counters and the checksum of every other file


# What the code of a converted run's origin does in its sampling script, as settings of `repa sample`; channels: those that
# its cfg guides. The run records its kind, a key of this table.
SAMPLING: dict[str, dict[str, Any]] = {
    # On every path; ours is 2sigma, the same on the linear one alone.
    "repa": {"sampler": "euler_maruyama:diffusion=2t"},
    "sit": {"sampler": "euler_maruyama:diffusion=2sigma", "channels": 3},
    "dit": {"sampler": "ddpm", "channels": 3},
}


def step_name(step: int) -> str:
    return f"{step:07d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / step_name(step)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending: a folder gets its name only once it is whole."""
    return _steps(run / CHECKPOINTS)


def part_name(file: str, part: int, count: int) -> str:
    """Part 0 ... count - 1 of a file: model-00001-of-00003.safetensors, or the file's own name where it is the only one."""
    return file if count == 1 else f"{file.removesuffix(WEIGHTS)}-{part + 1:05d}-of-{count:05d}{WEIGHTS}"


def whole_name(part: str) -> str:
    """The file that a part is of."""
    return PART_OF.sub(WEIGHTS, part)


def part_files(folder: Path, file: str) -> list[Path]:
    """The parts of a checkpoint's file, in order; of a file in one piece itself; of none nothing."""
    return sorted(path for path in folder.glob(f"*{WEIGHTS}") if whole_name(path.name) == file)


def snapshot_folder(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / step_name(step)


def snapshot_steps(run: Path) -> list[int]:
    return _steps(run / SNAPSHOTS)


def average_file(run: Path, step: int, name: str) -> Path:
    return run / AVERAGES / step_name(step) / f"{name}{WEIGHTS}"


def tidy(run: Path) -> None:
    """Remove what killed training left in a run folder, whose lock is held; other commands have locks for what they write there."""
    files.remove_leftovers(run, (CONFIG, DATA, METRICS).__contains__)
    files.remove_leftovers(run / SAMPLES, lambda name: _is_step(name.partition(".")[0]))
    for name in (CHECKPOINTS, SNAPSHOTS):
        files.remove_leftovers(run / name)


def average_steps(run: Path, name: str) -> list[int]:
    return [step for step in _steps(run / AVERAGES) if average_file(run, step, name).is_file()]


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if _is_step(p.name) and p.is_dir()) if folder.is_dir() else []


def _is_step(name: str) -> bool:
    """A name as `step_name` writes them: not '²', nor a number that would name another folder."""
    return name.isascii() and name.isdigit() and len(name) < 19 and name == step_name(int(name))


def preview(run: Path, step: int, suffix: str) -> Path:
    return run / SAMPLES / f"{step_name(step)}{suffix}"


def prompts_file(run: Path) -> Path:
    """Of which texts the previews are, a JSON list in their order; of a run that was trained on captions."""
    return run / SAMPLES / "prompts.json"


def preview_steps(run: Path) -> list[int]:
    folder = run / SAMPLES
    return sorted(int(p.stem) for p in folder.glob("*.npz") if _is_step(p.stem)) if folder.is_dir() else []


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced, the first and the last among them; of one only the last."""
    if len(items) <= most:
        return list(items)
    return [items[-1]] if most == 1 else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def read_config(run: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of a run as plain values, which have the TYPES; `needed` are there."""
    path = Path(run) / CONFIG
    if not path.is_file():
        inside = [found.parent for found in sorted(Path(run).glob(f"*/{CONFIG}"))]
        meant = f" Did you mean {listed(inside)}?" if 0 < len(inside) <= FEW else ""
        raise UserError(
            f"{run} is not a run folder: it has no {CONFIG}. Give the --out folder of a `repa train`.{meant}"
        )
    values = read_yaml(path)
    for name in sorted(TYPES.keys() & values.keys()):
        try:
            TypeAdapter(TYPES[name]).validate_python(values[name], strict=True)
        except ValidationError:
            wrong = str(values[name])[:80]
            raise UserError(f"{path} is damaged: its {name!r} is {wrong!r}, which no run has.") from None
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{path} lacks the setting {missing[0]!r}: it is not what `repa train` wrote.")
    return values


def fixed_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What a run computes, of its configuration as plain values: dotted name -> value; for the record of a checkpoint."""
    fixed = leaves({name: value for name, value in config.items() if name not in CHANGEABLE})
    return {name: repr(list(value) if isinstance(value, tuple) else value) for name, value in fixed.items()}


def require_settings(run: Path, step: int, recorded: Any, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the configuration of a run still says what a checkpoint has on record (None: nothing).

    A setting that the record lacks is of a later version.
    """
    if recorded is None:
        return
    found = fixed_settings(config)
    if not isinstance(recorded, dict):
        recorded = {"settings": recorded}
    for name, before in recorded.items():
        if (now := found.get(name)) != before:
            raise UserError(
                f"{run / CONFIG} says {name}: {now}, but the checkpoint of step {step:,} is of {name}: {before!s:.200}. Restore the "
                "configuration; a run of other settings needs another --out."
            )


def kind_of(run: Path) -> str:
    """A key of SAMPLING for a converted run, else an empty text."""
    path = run / ORIGIN
    kind = files.read_object(path, kind=str)["kind"] if path.is_file() else ""
    return kind if kind in SAMPLING else ""


def refuse_converted(run: Path) -> None:
    """UserError when this run folder was converted: it holds no state of an optimizer to continue from."""
    path = run / ORIGIN
    if path.is_file():
        raise UserError(
            f"{run} was converted from {files.read_object(path, origin=str)['origin']}, which does not hold the optimizer's "
            f"state, so it cannot be continued: fine-tune it in a new folder, repa train RECIPE --data DATA --out NEW --init {run}."
        )
