"""The training log: metrics.jsonl, log.txt, TensorBoard (if installed) and Weights & Biases (optional), written by one process."""

import contextlib
import json
import math
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from repa.base import dist, faults, files, imports
from repa.base.errors import UserError
from repa.runs import layout

CRC = "crc"  # key of an entry's checksum, which covers its other values
MOST_BYTES = 2**29  # of metrics.jsonl: about a million entries


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The entries of metrics.jsonl in order, without a last line that a kill truncated."""
    path = Path(run) / layout.METRICS
    if not path.is_file():
        return
    with faults.reading(path, "text"):
        if (num_bytes := path.stat().st_size) > MOST_BYTES:
            raise UserError(
                f"{path} is refused: it has {files.size(num_bytes)}, but may have at most {files.size(MOST_BYTES)}. Move it away."
            )
        file = path.open("rb")
    with file:
        yield from _rows(path, file)


def _rows(path: Path, lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode(), parse_int=_plain_number)
        except (ValueError, RecursionError):
            # A kill can truncate only the last line.
            if line.endswith(b"\n"):
                raise UserError(f"{path} is damaged in line {number}: it is not JSON. Remove that line.") from None
        else:
            # Training writes nothing else, but the folder is untrusted.
            if isinstance(row, dict) and type(row.get("step")) is int:
                if row.pop(CRC, None) not in (None, _crc_of(row)):
                    raise UserError(
                        f"{path} is damaged in line {number}: it does not match its checksum. Remove that line."
                    )
                yield row


def _plain_number(text: str) -> float:
    """A number of JSON; one that no training counts to becomes a float, perhaps infinite, because int has no bound."""
    return int(text) if len(text) < 19 else float(text)


def lost_rows(run: Path, rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> str:
    """A sentence if metrics.jsonl has no training entry for one of the checkpoints of `steps`; otherwise an empty string.

    Training writes the entry before the checkpoint, so the file was truncated, or a crash of the machine lost the entry.
    """
    logged = {row["step"] for row in rows if row.get("kind") == "train"}
    lost = [step for step in steps if step not in logged]
    if not lost or not (run / layout.METRICS).is_file():  # a converted run has none
        return ""
    return (
        f"{layout.METRICS} has lost entries: it has none of step {lost[0]:,}, although its checkpoint exists. Restore the file from a "
        "copy; without it the curves are incomplete."
    )


def _line(row: dict[str, Any]) -> str:
    """An entry as a line of JSON, with a checksum of its other values."""
    return json.dumps({**row, CRC: _crc_of(row)}) + "\n"


def _crc_of(row: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"


class Board(Protocol):
    """Another destination of the numbers."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends entries to metrics.jsonl, and sends their numbers to the boards.

    Args:
        run: run folder.
        resume_step: entries after it are dropped, because training repeats their steps.
        project: project at Weights & Biases; empty: not used.
        config: settings for display at Weights & Biases.

    Raises:
        UserError: Weights & Biases is not available.
    """

    def __init__(self, run: Path, resume_step: int = 0, *, project: str = "", config: Mapping[str, Any] | None = None):
        self.main = dist.is_main()
        self.lost = ""  # a sentence if entries before `resume_step` are missing
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
        """Write one entry. Values are numbers, strings or dictionaries of them; non-finite numbers, which JSON lacks, become null."""
        if not self.main:
            return
        self.metrics.write(_line(_plain({"kind": kind, "step": step, **values})))
        numbers = {f"{kind}/{name}": value for name, value in _scalars(values)}
        for board in self.boards if numbers else ():
            board.scalars(step, numbers)

    def line(self, text: str) -> None:
        """Write a line to log.txt."""
        if self.main:
            self.text.write(text + "\n")

    def close(self) -> None:
        if self.main:
            self.metrics.close()
            self.text.close()
            for board in self.boards:
                board.close()


def _appended(path: Path) -> TextIO:
    """Open a text file for appending; refuses symbolic links, which lead out of an untrusted run folder."""
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link, and links are not followed: remove it.")
    faults.require_plain(path)
    # Line-buffered: a kill leaves complete lines, and readers of the file see them immediately.
    return path.open("a", buffering=1, encoding="utf-8")


class WeightsAndBiases:
    """A W&B run for a run folder, resumed with the training; offline data stay in the folder's `wandb/` until synced."""

    def __init__(self, run: Path, project: str, config: Mapping[str, Any]):
        wandb = imports.need("wandb", "--wandb")
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
                f"Weights & Biases is not available ({reason}): run `wandb login`, set WANDB_MODE=offline, or remove --wandb."
            ) from None
        # W&B's counter cannot go back, but training repeats the steps after the last checkpoint.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """TensorBoard event files in the run's folder `tensorboard/`."""

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
