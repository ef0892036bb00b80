"""Checkpoints: folders that are written atomically, with a checksum of every file."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from repa.base import dist, faults, files
from repa.base.errors import UserError
from repa.base.weights import digest_of
from repa.models.lora import merged_weights
from repa.runs import layout

RECORD = "repa"  # the only entry in the header of files of `save_checked`: safetensors writes several in random order
SETTINGS = "settings"  # counter of a checkpoint, see `recorded_settings`
PART = 2**30  # bytes; several processes split larger files into parts


class Checkpoint(NamedTuple):
    """The training state, or the share of it that one of several processes writes.

    Randomness and data order are functions of (seed, step), so they are not stored. All tensors are full (not sharded) and
    on the CPU, so any number of processes can continue.
    """

    step: int
    counters: dict[str, Any]  # plain values, for example training seconds
    tensors: Mapping[str, dict[str, Tensor]]  # file, see layout.py -> its tensors; the optimizer's are "PARAMETER/WHAT"

    @property
    def model(self) -> dict[str, Tensor]:
        return self.tensors.get(layout.MODEL_FILE, {})

    @property
    def ema(self) -> dict[str, Tensor]:
        return self.tensors.get(layout.EMA_FILE, {})

    @property
    def projectors(self) -> dict[str, Tensor]:
        return self.tensors.get(layout.PROJECTORS_FILE, {})


class OwnedTensor(NamedTuple):
    """A checkpoint tensor that one process has read; in the other processes `value` has only shape and type."""

    value: Tensor
    owner: int  # rank of the process that has read it


def shares(sizes: Mapping[str, Mapping[str, int]], num: int) -> list[dict[str, list[str]]]:
    """For each of `num` processes, balanced by bytes: file or part of a file -> names of the tensors that it writes there.

    Args:
        sizes: file -> tensor -> bytes.
    """
    pieces = []
    for file, tensors in sizes.items():
        total, begin = max(1, sum(tensors.values())), 0
        most = min(num, -(-total // PART))
        parts: dict[int, list[str]] = {}
        # A tensor is never split: it goes to the part in which it begins, so each file can be read alone.
        for name, size in tensors.items():
            parts.setdefault(min(begin * most // total, most - 1), []).append(name)
            begin += size
        for number, names in enumerate(parts.values() or [[]]):
            piece = layout.part_name(file, number, max(1, len(parts)))
            pieces.append((sum(tensors[name] for name in names), piece, names))
    written: list[dict[str, list[str]]] = [{} for _ in range(num)]
    load = [0] * num
    # Largest first, each to the process with the fewest bytes: this balances the load.
    for size, piece, names in sorted(pieces, key=lambda piece: -piece[0]):
        least = load.index(min(load))
        written[least][piece] = names
        load[least] += size
    return written


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int = 0, keep_every: int = 0) -> Path:
    """Write a checkpoint atomically, then remove older checkpoints by `keep` and `keep_every`.

    Args:
        run: run folder.
        checkpoint: what to write; an existing checkpoint of its step is kept, because it is the same state.
        keep: number of newest checkpoints to keep; 0: all.
        keep_every: also keep checkpoints whose step is a multiple of this; 0: none.

    Raises:
        UserError: the disk is full; existing checkpoints are intact.
    """
    folder = layout.checkpoint_folder(run, checkpoint.step)
    if not folder.exists():
        files.remove_leftovers(folder.parent)  # of a process that was killed during writing or removal
        with files.atomic_folder(folder) as temporary:
            write_state(temporary, checkpoint, write_files(temporary, checkpoint))
    remove_older(run, keep, keep_every)
    return folder


def write_files(folder: Path, checkpoint: Checkpoint) -> dict[str, str]:
    """Write the tensors; returns the checksum of each file as read back from the disk."""
    for name, tensors in checkpoint.tensors.items():
        save_file({key: value.detach().contiguous().cpu() for key, value in tensors.items()}, folder / name)
        files.sync(folder / name)
    return {name: files.sha256(folder / name) for name in checkpoint.tensors}


def remove_older(run: Path, keep: int, keep_every: int) -> None:
    """Remove older checkpoints by `keep` and `keep_every`, see `save_checkpoint`."""
    for step in layout.checkpoint_steps(run)[:-keep] if keep else ():
        if not keep_every or step % keep_every:
            files.remove_folder(layout.checkpoint_folder(run, step))


def load_checkpoint(run: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint of `step` (default: the highest), on the CPU; None if the run has none.

    Nothing is unpickled: an untrusted folder can hold wrong numbers but cannot run code.
    """
    run = Path(run)
    steps = layout.checkpoint_steps(run)
    if step is None:
        if not steps:
            return None
        step = steps[-1]
    folder, state = _verified(run, step)
    names = dict.fromkeys(layout.whole_name(name) for name in state["sha256"] if name.endswith(layout.WEIGHTS))
    return Checkpoint(step, state["counters"], {file: _read_parts(folder, file) for file in names})


def load_owned(run: Path) -> tuple[int, dict[str, Any], dict[str, dict[str, OwnedTensor]]] | None:
    """Step, counters and tensors by file of the newest checkpoint; None if the run has none. All processes must call this.

    Each file or part of a file is read and verified by one of the processes that see the folder.
    """
    steps = dist.on_main(lambda: layout.checkpoint_steps(run)[-1:])
    if not steps:
        return None
    (step,) = steps
    # The run folder may be on a local disk of each machine: only processes that see the main process's checkpoint read it.
    folder, state = layout.checkpoint_folder(run, step), dist.on_main(lambda: _state(run, step))
    sees = dist.gather_objects(dist.is_main() or _is_state(folder, state))
    readers = [rank for rank, can in enumerate(sees) if can]
    names = sorted(name for name in state["sha256"] if name.endswith(layout.WEIGHTS))
    owners = {name: readers[place % len(readers)] for place, name in enumerate(names)}
    with dist.together():
        mine = [name for name in names if owners[name] == dist.rank()]
        _require_intact(run, folder, state, mine)
        read = {name: _read(folder / name) for name in mine}
    # The other processes get names, types and shapes; tensors on the meta device are cheap to send.
    outlines = dist.gather_objects(
        {name: {key: x.to("meta") for key, x in tensors.items()} for name, tensors in read.items()}
    )
    found: dict[str, dict[str, OwnedTensor]] = {}
    for name, owner in owners.items():
        tensors = read.get(name, outlines[owner][name])
        found.setdefault(layout.whole_name(name), {}).update({key: OwnedTensor(x, owner) for key, x in tensors.items()})
    return step, state["counters"], found


def _is_state(folder: Path, state: Mapping[str, Any]) -> bool:
    """Whether this process sees the main process's checkpoint; it may see another folder, or none."""
    try:
        return _read_state(folder, state["step"]) == state
    except UserError:
        return False


def save_checked(tensors: Mapping[str, Tensor], path: Path, settings: Mapping[str, str]) -> None:
    """Write a safetensors file with the settings of its run and a checksum in the header, for `load_checked`."""
    tensors = {name: x.detach().contiguous().cpu() for name, x in tensors.items()}
    record = {"sha256": files.json_sha256([digest_of(tensors), settings]), SETTINGS: settings}
    save_file(tensors, path, metadata={RECORD: json.dumps(record)})


def load_checked(run: Path, path: Path, remedy: str) -> dict[str, Tensor]:
    """Read a file of `save_checked`; raises UserError if it does not match its checksum, or belongs to another run."""
    with faults.reading(path, "a safetensors file", remedy), safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {}).get(RECORD, "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    if record is None:
        raise UserError(f"{path} does not name its run: an earlier version of repa wrote it. {remedy}")
    settings = record.get(SETTINGS) if isinstance(record, dict) else None
    if not isinstance(settings, dict) or record.get("sha256") != files.json_sha256([digest_of(tensors), settings]):
        raise UserError(f"{path} is damaged: it does not match its checksum. {remedy}")
    found = layout.fixed_settings(layout.read_config(run)) if settings else {}
    if name := next((name for name in settings if found.get(name) != settings[name]), ""):
        raise UserError(
            f"{path} is of another run: its run has {name}: {settings[name]!s:.80}, but {run / layout.CONFIG} has "
            f"{found.get(name)!s:.80}. {remedy}"
        )
    return tensors


def _read_parts(folder: Path, file: str) -> dict[str, Tensor]:
    return {name: x for path in layout.part_files(folder, file) for name, x in _read(path).items()}


def _read(path: Path) -> dict[str, Tensor]:
    with faults.reading(path, "a safetensors file", "Restore it from a copy, or use another checkpoint."):
        return load_file(path)


def load_weights(run: Path, weights: str, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """(step, state dict) of the network: "ema", "model", or another average by name, from a checkpoint or from `repa ema`.

    Training may replace the newest checkpoint during reading: then the new newest one is read.
    LoRA updates are merged into the weights.
    """
    while True:
        before = layout.checkpoint_steps(run)
        try:
            found, state = _load_weights(run, weights, step)
            return found, merged_weights(state)
        except (UserError, OSError):
            if step is not None or layout.checkpoint_steps(run) == before:
                raise


def _load_weights(run: Path, weights: str, step: int | None) -> tuple[int, dict[str, Tensor]]:
    steps = layout.checkpoint_steps(run)
    if not steps:
        raise UserError(f"{run} has no checkpoint yet: train it first (repa train ... --out {run}).")
    made = layout.average_steps(run, weights)
    wanted, step = step, steps[-1] if step is None else step
    paths = layout.checkpoint_folder(run, step).glob(f"*{layout.WEIGHTS}")
    names = {layout.whole_name(path.name).removesuffix(layout.WEIGHTS) for path in paths}
    names -= {Path(layout.PROJECTORS_FILE).stem, Path(layout.OPTIMIZER_FILE).stem}
    # A checkpoint's average takes precedence over one of `repa ema` with the same name; without a step, the newest is used.
    if weights not in names and made and wanted in (None, *made):
        step = made[-1] if wanted is None else wanted
        return step, load_checked(run, layout.average_file(run, step, weights), f"Make it again with `repa ema {run}`.")
    if names and weights not in names:
        raise UserError(
            f"{run} has no weights {weights!r} at step {step}: choose {', '.join(sorted(names))}, or make an average of another width "
            f"from snapshots with `repa ema {run}`."
        )
    folder, _ = _verified(run, step, only=weights + layout.WEIGHTS)
    return step, _read_parts(folder, weights + layout.WEIGHTS)


def recorded_settings(run: Path, step: int) -> Any:
    """`layout.fixed_settings` of a checkpoint's configuration; None if none are recorded."""
    try:
        return _read_state(layout.checkpoint_folder(run, step), step)["counters"].get(SETTINGS)
    except (UserError, OSError):
        if step in layout.checkpoint_steps(run):
            raise
        return None  # an average of `repa ema`, or a checkpoint that training has replaced meanwhile


def load_projectors(run: Path, step: int) -> dict[str, Tensor]:
    """The projectors of a checkpoint, "TERM.projector...." -> tensor."""
    return _read_parts(_verified(run, step, only=layout.PROJECTORS_FILE)[0], layout.PROJECTORS_FILE)


def weights_checksum(run: Path, weights: str, step: int) -> str:
    """SHA-256 of the file of `load_weights`: as its checkpoint records it, or computed for an average of `repa ema`.

    For a file in parts it is the checksum of their checksums, one per line.
    """
    folder = layout.checkpoint_folder(run, step)
    if paths := layout.part_files(folder, weights + layout.WEIGHTS):
        recorded = _read_state(folder, step)["sha256"]
        found = [recorded[path.name] for path in paths]
        return found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
    return files.sha256(layout.average_file(run, step, weights))


def write_state(folder: Path, checkpoint: Checkpoint, checksums: Mapping[str, str]) -> None:
    """Write state.json: the step, the counters, and the checksum of every other file."""
    state = {"step": checkpoint.step, "counters": checkpoint.counters, "sha256": dict(sorted(checksums.items()))}
    files.write_sealed(folder / layout.STATE_FILE, state)


def _read_state(folder: Path, step: int) -> dict[str, Any]:
    """Read state.json of a checkpoint; raises UserError if it is damaged."""
    path = folder / layout.STATE_FILE
    state = files.read_object(path, True, step=int, counters=dict, sha256=dict)
    if len(state) != 3 or state["step"] != step:
        raise UserError(f"{path} is damaged: its fields or its step are wrong.")
    # An untrusted checkpoint must not name files outside its folder.
    if any(Path(name).name != name for name in state["sha256"]):
        raise UserError(f"{path} names files outside its folder and is refused: use another checkpoint.")
    return state


def _verified(run: Path, step: int, only: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Folder and state of a checkpoint after verifying its files, or only the parts of the file `only`."""
    folder, state = layout.checkpoint_folder(run, step), _state(run, step)
    names = [name for name in state["sha256"] if only in (None, layout.whole_name(name))]
    if not names:
        path = folder / layout.STATE_FILE
        raise UserError(f"{path} is damaged: it lacks the checksum of {only}. {_remedy(run, step)}")
    _require_intact(run, folder, state, names)
    return folder, state


def _state(run: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint; raises UserError if it is missing or damaged."""
    steps = layout.checkpoint_steps(run)
    folder = layout.checkpoint_folder(run, step)
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}: there are {', '.join(map(str, steps)) or 'none'}.")
    try:
        return _read_state(folder, step)
    except UserError as error:
        path = folder / layout.STATE_FILE
        raise UserError(f"{path} is damaged. {_remedy(run, step)}") from error


def _require_intact(run: Path, folder: Path, state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises UserError for the first of the files `names` that is missing or does not match its checksum."""
    for name in names:
        if not (folder / name).is_file() or files.sha256(folder / name) != state["sha256"][name]:
            raise UserError(
                f"{folder / name} is damaged: it does not match its checksum. {_remedy(run, state['step'])}"
            )


def _remedy(run: Path, step: int) -> str:
    before = [s for s in layout.checkpoint_steps(run) if s < step]
    then = f"continues from step {before[-1]}" if before else "starts again from step 0"
    return f"Remove {layout.checkpoint_folder(run, step)} and the run {then}."
