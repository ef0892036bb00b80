"""A run folder read back: its configuration, its data and the rows of its metrics, as plain values."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.runs import layout
from repa.runs.log import read_metrics

# The settings that make a Fréchet distance: two numbers are compared only when all of these agree.
PROTOCOL = ("features", "num_samples", "sampler", "steps", "nfe", "guidance", "decoder", "weights")

Protocol = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunRecord:
    """Everything the report needs to know of one run; pictures stay on disk until they are drawn."""

    path: Path
    name: str
    config: dict[str, Any]
    data: dict[str, Any]
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]  # by step; of repeated evaluations (same step and protocol) the last
    events: list[dict[str, Any]]

    @property
    def alignments(self) -> list[dict[str, Any]]:
        """The alignment settings that reached the network: not those of weight 0 or those that only measure."""
        items = self.config.get("alignments") or []
        return [item for item in items if item.get("weight") != 0 and not item.get("measure_only")]

    @property
    def is_aligned(self) -> bool:
        return bool(self.alignments)

    @property
    def steps(self) -> int:
        """The last step that left a row (0 when none did)."""
        return max((row["step"] for row in [*self.train, *self.evals]), default=0)

    @cached_property
    def alignment_names(self) -> list[str]:
        """The alignments that were measured, e.g. 'dinov2-b@8', trained on or not."""
        return list(dict.fromkeys(name for row in self.train for name in row.get("alignment") or {}))

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(positions, values) of one quantity over the training rows; 'alignment/NAME' is the negative of its loss.

        Rows without the quantity, or where it is not finite, are left out.
        """
        group, _, name = key.partition("/")
        values = [(row.get(group) or {}).get(name) if name else row.get(group) for row in self.train]
        sign = -1.0 if group == "alignment" else 1.0
        pairs = [(row.get(against), value) for row, value in zip(self.train, values, strict=True)]
        pairs = [(x, sign * value) for x, value in pairs if is_number(x) and is_number(value)]
        return [x for x, _ in pairs], [value for _, value in pairs]

    def distances(self, protocol: Protocol) -> list[dict[str, Any]]:
        """The evaluations with a finite Fréchet distance made by `protocol`, by step."""
        return [row for row in self.evals if is_number(row.get("frechet_distance")) and protocol_of(row) == protocol]

    @property
    def protocols(self) -> list[Protocol]:
        """The ways this run's Fréchet distances were made; the one of the last evaluation first."""
        rows = [row for row in reversed(self.evals) if is_number(row.get("frechet_distance"))]
        return list(dict.fromkeys(protocol_of(row) for row in rows))


def read_run(path: str | Path, name: str | None = None) -> RunRecord:
    """Read a run folder. Raises UserError, naming the folder, when it is none.

    Args:
        path: what `repa train --out` wrote; metrics, data.json and previews may be missing, the configuration may not.
        name: how the report calls it; the folder's name when None.
    """
    path = Path(path)
    config = layout.read_config(path)
    data = read_json(path / layout.DATA) if (path / layout.DATA).is_file() else {}
    rows = [row for row in read_metrics(path) if isinstance(row.get("step"), int)]
    kinds = {kind: [row for row in rows if row.get("kind") == kind] for kind in ("train", "eval", "event")}
    latest = {(row["step"], protocol_of(row)): row for row in kinds["eval"]}
    evals = sorted(latest.values(), key=lambda row: row["step"])
    return RunRecord(path, name or path.resolve().name, config, data, kinds["train"], evals, kinds["event"])


def read_runs(runs: Sequence[str | Path | RunRecord], names: Sequence[str] | None = None) -> list[RunRecord]:
    """Read several run folders (records pass through) under names that differ."""
    if not runs:
        raise UserError("A report needs at least one run folder.")
    if names is not None and len(names) != len(runs):
        raise UserError(
            f"{len(names)} names were given for {len(runs)} runs: give one name per run, in the same order."
        )
    records = [
        run if isinstance(run, RunRecord) else read_run(run, names[i] if names else None) for i, run in enumerate(runs)
    ]
    repeated = next((r.name for i, r in enumerate(records) if r.name in {other.name for other in records[:i]}), None)
    if repeated is not None:
        raise UserError(f"Two runs are called {repeated!r}: give each its own name with --names.")
    return records


def protocol_of(row: dict[str, Any]) -> Protocol:
    """How an evaluation's numbers were made, as something that can be compared."""
    return tuple((key, json.dumps(row[key], sort_keys=True)) for key in PROTOCOL if row.get(key) is not None)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
