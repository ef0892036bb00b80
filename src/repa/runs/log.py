"""metrics.jsonl, log.txt, TensorBoard (when installed) and Weights & Biases (when asked for): written from here, by one process."""

import contextlib
import json
import math
import secrets
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from repa.base import dist, extras, faults, files
from repa.base.errors import UserError
from repa.runs import layout

CRC = "crc"  # of a row: the checksum of the rest


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl in order. A last line that a kill cut in half is left out."""
    path = Path(run) / layout.METRICS
    if not path.is_file():
        return
    with faults.reading(path, "text", "Remove the bytes that are none."):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Only the last line can have been cut by a kill: any other was followed by a whole one.
            if number < len(lines):
                raise UserError(f"{path} is damaged in line {number}: it is not JSON. Remove that line.") from None
        else:
            # Ours holds nothing else, but the folder may come from elsewhere.
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                if row.pop(CRC, None) not in (None, _crc_of(row)):
                    raise UserError(
                        f"{path} is damaged in line {number}: it is not as it was written. Remove that line."
                    )
                yield row


def lost_rows(run: Path, rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> str:
    """A sentence when metrics.jsonl has no training row of one of the checkpoints of these `steps`, else an empty text.

    Training writes the row before the checkpoint, so such a row was there: the file was cut, or a crash of the machine lost it.
    """
    logged = {row["step"] for row in rows if row.get("kind") == "train"}
    lost = [step for step in steps if step not in logged]
    if not lost or not (run / layout.METRICS).is_file():  # a run that was converted has none
        return ""
    return (
        f"{layout.METRICS} has lost rows: it has none of step {lost[0]:,}, whose checkpoint was written after it. Restore the file from a "
        "copy, or take the curves for incomplete."
    )


def _line(row: dict[str, Any]) -> str:
    """A row as it is written, with a checksum of the rest of it."""
    return json.dumps({**row, CRC: _crc_of(row)}) + "\n"


def _crc_of(row: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"


class Board(Protocol):
    """Somewhere else that numbers are shown."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends rows to metrics.jsonl; their numbers go to the boards too.

    Args:
        run: run folder.
        resume_step: rows after it belong to steps that will be done again, and are dropped.
        project: of Weights & Biases; empty: none.
        config: settings that Weights & Biases shows next to the curves.

    Raises:
        UserError: Weights & Biases is not available.
    """

    def __init__(self, run: Path, resume_step: int = 0, *, project: str = "", config: Mapping[str, Any] | None = None):
        self.main = dist.is_main()
        self.lost = ""  # a sentence when rows before `resume_step` are gone
        if not self.main:
            return
        run.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(run) if row["step"] <= resume_step]
        self.lost = lost_rows(run, kept, [resume_step] if resume_step else [])
        files.write_text(run / layout.METRICS, "".join(map(_line, kept)) if resume_step else "")
        self.boards: list[Board] = [WeightsAndBiases(run, project, config or {})] if project else []
        with contextlib.suppress(ImportError):  # an optional extra: repa[tensorboard]
            self.boards.append(TensorBoard(run, resume_step))
        self.metrics, self.text = _appended(run / layout.METRICS), _appended(run / layout.LOG)

    def row(self, kind: str, step: int, **values: Any) -> None:
        """One line. Values are plain numbers, strings or dictionaries of them; non-finite numbers become null, as JSON has none."""
        if not self.main:
            return
        self.metrics.write(_line(_plain({"kind": kind, "step": step, **values})))
        numbers = {f"{kind}/{name}": value for name, value in _scalars(values)}
        for board in self.boards if numbers else ():
            board.scalars(step, numbers)

    def line(self, text: str) -> None:
        """A plain line for log.txt."""
        if self.main:
            self.text.write(text + "\n")

    def close(self) -> None:
        if self.main:
            self.metrics.close()
            self.text.close()
            for board in self.boards:
                board.close()


def _appended(path: Path) -> TextIO:
    """A text file to add lines to; a link in a run from elsewhere would lead out of it."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, which is not followed: remove it.")
    # Line by line: a kill leaves whole rows behind, and whoever watches the file sees them at once.
    return path.open("a", buffering=1, encoding="utf-8")


class WeightsAndBiases:
    """One run there for one run folder, continued when training is; offline it lies in the folder's `wandb/` until synced."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        wandb = extras.need("wandb", "--wandb")
        name = run / layout.WANDB_ID
        if not name.is_file():
            files.write_text(name, secrets.token_hex(4))
        try:
            self.run = wandb.init(
                project=project, name=run.resolve().name, id=name.read_text(encoding="utf-8"), resume="allow", dir=str(run),
                config=dict(config), settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"Weights & Biases cannot be used ({reason}): run `wandb login`, set WANDB_MODE=offline, or leave out --wandb."
            ) from None
        # Its own counter cannot go back; ours does, when steps after the last checkpoint are done again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Its event files, in the run's folder `tensorboard/`."""

    def __init__(self, run: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            yield prefix + key, value
