"""Where a converted run came from, and how the code of its origin samples. Torch-free."""

from pathlib import Path
from typing import Any

from repa.base import files
from repa.base.errors import UserError
from repa.runs import layout

# What each project's own sampling script does, as settings of `repa sample`; channels: those that its cfg
# guides. The run records its kind, a key of this table.
SAMPLING: dict[str, dict[str, Any]] = {
    "repa": {
        "sampler": "euler_maruyama:diffusion=2t"
    },  # on every path; ours is 2sigma, the same on the linear one alone
    "sit": {"sampler": "euler_maruyama:diffusion=2sigma", "channels": 3},
    "dit": {"sampler": "ddpm", "channels": 3},
}


def write_origin(folder: Path, origin: str, kind: str) -> None:
    """Record the name of the file and whose code made it ("" where that is not known)."""
    files.write_json(folder / layout.ORIGIN, {"origin": origin, "kind": kind})


def kind_of(run: Path) -> str:
    """A key of SAMPLING for a converted run, else an empty text."""
    path = run / layout.ORIGIN
    kind = files.read_object(path, kind=str)["kind"] if path.is_file() else ""
    return kind if kind in SAMPLING else ""


def refuse_converted(run: Path) -> None:
    """UserError when this run folder was converted: it holds no state of an optimizer to continue from."""
    path = run / layout.ORIGIN
    if path.is_file():
        raise UserError(
            f"{run} was converted from {files.read_object(path, origin=str)['origin']}, which tells nothing of the optimizer, so it cannot "
            f"be continued: fine-tune it in a new folder, repa train RECIPE --data DATA --out NEW --init {run}."
        )
