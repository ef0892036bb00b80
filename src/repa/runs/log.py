"""metrics.jsonl, log.txt and (when installed) TensorBoard, all written from here and by the main process only."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repa.base import dist, files
from repa.base.errors import UserError
from repa.runs import layout


def read_metrics(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl in order. A last line that a kill cut in half is left out."""
    path = Path(run) / layout.METRICS
    if not path.is_file():
        return
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise UserError(f"{path} is damaged in line {number}: it is no JSON. Remove that line.") from None


class MetricsLog:
    """Appends rows to metrics.jsonl; scalars go to TensorBoard too when that is installed."""

    def __init__(self, run: Path, resume_step: int = 0):
        """Rows after `resume_step` belong to steps that will be done again: they are dropped."""
        self.main = dist.is_main()
        self.board = None
        if not self.main:
            return
        run.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(run) if row["step"] <= resume_step]
        files.write_text(run / layout.METRICS, "".join(json.dumps(row) + "\n" for row in kept) if resume_step else "")
        self.metrics = (run / layout.METRICS).open("a", buffering=1)
        self.text = (run / layout.LOG).open("a", buffering=1)
        self.board = _tensorboard(run, resume_step)

    def row(self, kind: str, step: int, **values: Any) -> None:
        """One line. Values are plain numbers, strings or dictionaries of them; non-finite numbers become null, as JSON has none."""
        if not self.main:
            return
        self.metrics.write(json.dumps(_plain({"kind": kind, "step": step, **values})) + "\n")
        if self.board is not None:
            for name, value in _scalars(values):
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def line(self, text: str) -> None:
        """A plain line for log.txt."""
        if self.main:
            self.text.write(text + "\n")

    def close(self) -> None:
        if self.main:
            self.metrics.close()
            self.text.close()
            if self.board is not None:
                self.board.close()


def _tensorboard(run: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # an optional extra: repa[tensorboard]
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=resume_step + 1)


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
