"""File names of a run folder, its configuration, and the origin of a converted run. Torch-free.

RUN/
  config.yaml                 the resolved training configuration; itself accepted as a recipe
  data.json                   the training data: source, counts, class names, encoders
  metrics.jsonl               one JSON object per line: kind "train" (losses, rate) or "eval" (metrics of samples)
  log.txt                     start and resume times, and a line for every logged step
  checkpoints/0001000/        model, ema, projectors, optimizer (safetensors, large files in parts), state.json
  snapshots/0001000/          averages of power-function profiles in float16, for `repa ema`
  averages/0001000/           averages of `repa ema`, by width
  samples/0001000.npz, .png   previews: uint8 NHWC under arr_0 with labels, and an image grid
  evaluations/*.json          results of `repa evaluate` for the report
  analysis/                   results of `repa analyse`: tables (.json, .csv), pictures, and its cache
  report.html
  converted.json              only in folders of `repa convert`: the origin, and the code that made it
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from repa.base import files
from repa.base.config import leaves, read_yaml
from repa.base.errors import UserError

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
EXPORTED = "config.json"  # of exported networks, which are no runs
WANDB_ID = "wandb/id.txt"  # id of the run at Weights & Biases

# Settings of duration, output and speed, which do not change the result. accumulate, parallel, checkpoint_activations and
# compile change only the last digits of sums, as does another number of processes.
CHANGEABLE = (
    "num_steps", "epochs", "accumulate", "parallel", "checkpoint_activations", "compile", "compile_scope", "max_skipped_steps",
    "log_every", "save_every", "save_minutes", "keep_checkpoints", "keep_every", "async_save", "snapshot_every",
    "preview", "wandb", "autoencoder_weights", "feature_weights", "text_weights",
)  # fmt: skip
# Types of settings that are read as plain values; checked because the folder is untrusted.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("model", "diffusion", "optimizer", "preview"), dict[str, Any]),
    **dict.fromkeys(("alignments", "streams"), list[dict[str, Any]]),
    **dict.fromkeys(("autoencoder", "autoencoder_weights", "text", "text_weights"), str),
    "feature_weights": dict[str, str] | list[str],
    "label_dropout": Annotated[float, Field(ge=0, le=1)],
}
# Those of data.json.
DATA_TYPES: dict[str, Any] = {
    **dict.fromkeys(("source", "text"), dict[str, Any]),
    "num_images": int,
    "class_names": list[str],
    "class_counts": list[Annotated[int, Field(ge=0)]],
}

WEIGHTS = ".safetensors"
PART_OF = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
PROJECTORS_FILE = "projectors.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"  # step, counters and the checksum of every other file


# Kind of a converted run -> the settings of `repa sample` that match the original sampling script; channels: those that
# its cfg guides.
SAMPLING: dict[str, dict[str, Any]] = {
    # On every path. Our default is 2sigma, which is the same only on the linear path.
    "repa": {"sampler": "euler_maruyama:diffusion=2t"},
    "sit": {"sampler": "euler_maruyama:diffusion=2sigma", "channels": 3},
    "dit": {"sampler": "ddpm", "channels": 3},
}


def step_name(step: int) -> str:
    return f"{step:07d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / step_name(step)


def checkpoint_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending; incomplete ones have other names."""
    return _steps(run / CHECKPOINTS)


def part_name(file: str, part: int, count: int) -> str:
    """Name of part 0 ... count - 1 of a file: model-00001-of-00003.safetensors; a single part has the file's name."""
    return file if count == 1 else f"{file.removesuffix(WEIGHTS)}-{part + 1:05d}-of-{count:05d}{WEIGHTS}"


def whole_name(part: str) -> str:
    """The file to which a part belongs."""
    return PART_OF.sub(WEIGHTS, part)


def part_files(folder: Path, file: str) -> list[Path]:
    """The parts of a checkpoint's file, in order; the file itself if it is not split; empty if it is missing."""
    # Not glob, for which a folder that may not be listed is empty.
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if whole_name(path.name) == file)
    return []


def snapshot_folder(run: Path, step: int) -> Path:
    return run / SNAPSHOTS / step_name(step)


def snapshot_steps(run: Path) -> list[int]:
    return _steps(run / SNAPSHOTS)


def average_file(run: Path, step: int, name: str) -> Path:
    return run / AVERAGES / step_name(step) / f"{name}{WEIGHTS}"


def tidy(run: Path) -> None:
    """Remove temporary files of killed training runs. The caller holds the run's lock; other commands lock their own files."""
    files.remove_leftovers(run, (CONFIG, DATA, METRICS).__contains__)
    files.remove_leftovers(run / SAMPLES, lambda name: _is_step(name.partition(".")[0]))
    for name in (CHECKPOINTS, SNAPSHOTS, AVERAGES):  # `repa ema` writes in the folders of steps, not beside them
        files.remove_leftovers(run / name)


def average_steps(run: Path, name: str) -> list[int]:
    return [step for step in _steps(run / AVERAGES) if average_file(run, step, name).is_file()]


def folders_of_steps(folder: Path) -> list[Path]:
    """The folders that are named by steps, in their order."""
    return sorted(p for p in folder.iterdir() if _is_step(p.name) and p.is_dir()) if folder.is_dir() else []


def _steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folders_of_steps(folder))


def _is_step(name: str) -> bool:
    """Whether `step_name` writes this name; excludes '²' and numbers with another number of zeros."""
    return name.isascii() and name.isdigit() and len(name) < 19 and name == step_name(int(name))


def preview(run: Path, step: int, suffix: str) -> Path:
    return run / SAMPLES / f"{step_name(step)}{suffix}"


def prompts_file(run: Path) -> Path:
    """The prompts of the previews, a JSON list in their order; only for runs trained on captions."""
    return run / SAMPLES / "prompts.json"


def preview_steps(run: Path) -> list[int]:
    folder = run / SAMPLES
    return sorted(int(p.stem) for p in folder.glob("*.npz") if _is_step(p.stem)) if folder.is_dir() else []


def evenly_spaced(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` items, evenly spaced, including the first and the last; for most=1 the last."""
    if len(items) <= most:
        return list(items)
    return [items[-1]] if most == 1 else [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def require_run(run: Path) -> Path:
    """The configuration of a run; raises UserError if the folder is not a run."""
    path = run / CONFIG
    if not path.is_file():
        export = run.parent if run.is_file() else run
        if (export / EXPORTED).is_file():
            raise UserError(
                f"{run} is not a run folder, but an exported network: `repa convert {export} RUN` makes a run of it."
            )
        if run.parent.name == CHECKPOINTS and run.name.isdigit():
            raise UserError(
                f"{run} is a checkpoint, not a run folder: give {run.parent.parent}. `--checkpoint {int(run.name)}` selects it."
            )
        raise UserError(
            f"{run} is not a run folder: it has no {CONFIG}. Give the --out folder of `repa train`.{files.near(run, CONFIG)}"
        )
    return path


def is_trained(folder: Path) -> bool:
    """Whether a folder holds the files of `repa train`, not only a configuration that a user wrote."""
    return (folder / CONFIG).is_file() and any((folder / name).exists() for name in (CHECKPOINTS, DATA))


def require_run_or_empty(run: Path) -> None:
    """Raises UserError for a folder that holds other files than a run's; ignores files of a kill while a run was begun."""
    if run.is_dir() and not (run / CONFIG).is_file():
        temporary = (f".{DATA}.", f".{CONFIG}.")
        names = [path.name for path in run.iterdir()]
        if any(name != DATA and not (name.startswith(temporary) and name.endswith(".tmp")) for name in names):
            raise UserError(f"{run} is not empty and not a run: choose another --out folder.")


def read_config(run: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of a run as plain values, checked against TYPES; must contain `needed`."""
    path = require_run(Path(run))
    values = read_yaml(path)
    _require_types(path, values, TYPES)
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{path} lacks the setting {missing[0]!r}: restore it as `repa train` wrote it.")
    return values


def read_data(run: Path) -> dict[str, Any]:
    """The record of a run's training data, checked against DATA_TYPES; {} if the run has none, as a converted one."""
    path = run / DATA
    if not path.is_file():
        return {}
    values = files.read_object(path)
    _require_types(path, values, DATA_TYPES)
    counts, num_classes = values.get("class_counts", []), len(values.get("class_names", []))
    if counts and not (len(counts) == num_classes and any(counts)):
        raise UserError(
            f"{path} is damaged: class_counts must have a number for each of {num_classes} classes, and not only 0."
        )
    return values


def _require_types(path: Path, values: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name in sorted(types.keys() & values.keys()):
        try:
            TypeAdapter(types[name]).validate_python(values[name], strict=True)
        except ValidationError:
            wrong = str(values[name])[:80]
            raise UserError(
                f"{path} is damaged: {name!r} has the impossible value {wrong!r}. Restore it from a copy."
            ) from None


def fixed_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings that determine a run's result, for the record of a checkpoint: dotted name -> value."""
    fixed = leaves({name: value for name, value in config.items() if name not in CHANGEABLE})
    return {name: repr(list(value) if isinstance(value, tuple) else value) for name, value in fixed.items()}


def require_settings(run: Path, step: int, recorded: Any, config: Mapping[str, Any]) -> None:
    """Raises UserError if the configuration of a run differs from a checkpoint's record (None: no record).

    Settings that the record lacks are ignored: a later version added them.
    """
    if recorded is None:
        return
    found = fixed_settings(config)
    if not isinstance(recorded, dict):
        recorded = {"settings": recorded}
    for name, before in recorded.items():
        if (now := found.get(name)) != before:
            raise UserError(
                f"{run / CONFIG} has {name}: {now}, but the checkpoint of step {step:,} has {name}: {before!s:.200}. Restore the "
                "configuration, or train with other settings in another --out."
            )


def kind_of(run: Path) -> str:
    """The kind of a converted run, a key of SAMPLING; otherwise an empty string."""
    path = run / ORIGIN
    kind = files.read_object(path, kind=str)["kind"] if path.is_file() else ""
    return kind if kind in SAMPLING else ""


def refuse_converted(run: Path) -> None:
    """Raises UserError if this run folder was converted: it has no optimizer state to continue from."""
    path = run / ORIGIN
    if path.is_file():
        raise UserError(
            f"{run} was converted from {files.read_object(path, origin=str)['origin']}, which has no optimizer "
            f"state, so it cannot be continued: fine-tune it in a new folder, repa train RECIPE --data DATA --out NEW --init {run}."
        )
