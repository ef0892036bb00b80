"""What `repa analyse` left in the runs' folders: rows of CKNNA, CKA and probes, brought together over runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.report.results import Accuracy
from repa.report.runs import RunRecord, is_number
from repa.report.text import count
from repa.runs import layout

VALUES = {
    "probe": "top1",
    "cknna": "cknna",
    "cka": "cka",
    "cka-unbiased": "cka-unbiased",
}  # analysis -> key of its rows
NAMES = {"probe": "top-1 accuracy", "cknna": "CKNNA", "cka": "CKA", "cka-unbiased": "CKA, unbiased"}
# settings that say which rows are there and how they were computed, not what they are
ASIDE = {"analysis", "rows", "runs", "checkpoints", "depths", "times", "learning_rates", "batch_size", "store", "repa",
         "encoder_weights"}  # fmt: skip


@dataclass(frozen=True)
class Analysis:
    """Rows {run, step, t, depth, <value>} that were found in one way."""

    kind: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def value(self) -> str:
        return VALUES[self.kind]

    @property
    def label(self) -> str:
        variant = self.settings.get("variant", "paper") if self.kind == "cknna" else "paper"
        variant = "" if variant == "paper" else f" ({variant})"
        return NAMES[self.kind] + variant + (f" with {self.settings['encoder']}" if "encoder" in self.settings else "")

    @property
    def best(self) -> list[dict[str, Any]]:
        """The best row of each (run, step), over depths and noise levels."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for row in self.rows:
            key = row["run"], row["step"]
            if row["depth"] is not None and (key not in found or row[self.value] > found[key][self.value]):
                found[key] = row
        return list(found.values())


def read_analyses(records: Sequence[RunRecord]) -> list[Analysis]:
    """All rows in the folders of the runs, one `Analysis` for each way in which they were found; probes by their best
    learning rate. Raises UserError when a file is damaged."""
    found: dict[str, Analysis] = {}
    for run in records:
        for file in sorted((run.path / layout.ANALYSIS).glob("*.json")):
            content = _read(file)
            kind = content["analysis"]
            if kind not in VALUES:
                continue
            settings = {key: value for key, value in content.items() if key not in ASIDE}
            known = found.setdefault(json.dumps([kind, settings], sort_keys=True), Analysis(kind, settings))
            known.rows.extend(_called(row, run, records) for row in content["rows"] if is_number(row.get(known.value)))
    return [
        Analysis(each.kind, each.settings, _distinct(each.rows, each.value)) for each in found.values() if each.rows
    ]


def accuracies(analyses: Sequence[Analysis]) -> dict[tuple[str, int], Accuracy]:
    """(run, step) -> accuracy of the best block, as the paper's Acc.; where probes differ, that of the first."""
    found: dict[tuple[str, int], Accuracy] = {}
    for analysis in (each for each in analyses if each.kind == "probe"):
        for row in analysis.best:
            found.setdefault((row["run"], row["step"]), Accuracy(100 * row["top1"], row["depth"], row["t"]))
    return found


def caption(analysis: Analysis) -> str:
    given = analysis.settings
    parts = []
    if given.get("num_images"):
        parts.append(f"{count(given['num_images'])} images")
    elif "num_images" in given:
        parts.append("all images")
    if analysis.kind == "probe":
        tested = Path(given["val"]).name if given.get("val") else "a fifth of them"
        parts.append(f"of {Path(str(given.get('data'))).name}, tested on {tested}")
        parts.append(f"{given.get('epochs')} epochs; the best of several learning rates, where several were tried")
    else:
        parts.append(f"of {Path(str(given.get('data'))).name}")
        if analysis.kind == "cknna":
            parts.append(f"k = {given.get('neighbours')}, the {given.get('variant')} variant")
    return f"{analysis.label[0].upper()}{analysis.label[1:]} of each block: {'; '.join(parts)}. t = 0 is data."


def alt(analysis: Analysis) -> str:
    parts = [
        f"{row['run']} at {count(row['step'])} steps is highest at block {row['depth']}, t = {row['t']:g}, with {row[analysis.value]:.3f}"
        for row in analysis.best
    ]
    return f"{analysis.label} over depth: {'; '.join(parts)}."


def _read(file: Path) -> dict[str, Any]:
    content = read_json(file)
    rows = content.get("rows") if isinstance(content, dict) else None
    if (
        not isinstance(rows, list)
        or not isinstance(content.get("analysis"), str)
        or not all(isinstance(r, dict) for r in rows)
    ):
        raise UserError(
            f"{file} holds no results of `repa analyse`: it has no analysis and rows. Remove it, or make it anew."
        )
    if any(not {"run", "step", "t", "depth"} <= row.keys() for row in rows if content["analysis"] in VALUES):
        raise UserError(
            f"{file} is damaged: some of its rows lack run, step, t or depth. Make it anew by `repa analyse`."
        )
    return content


def _called(row: dict[str, Any], home: RunRecord, records: Sequence[RunRecord]) -> dict[str, Any]:
    """The row under the name that its run has in this report: the file says the folder's name, or its path."""
    if row["depth"] is None:
        return row
    asked = Path(str(row["run"])).name
    fitting = [run for run in records if run.path.resolve().name == asked]
    beside = [run for run in fitting if run.path.resolve().parent == home.path.resolve().parent]
    found = [home] if home in fitting else beside if len(beside) == 1 else fitting
    return {**row, "run": found[0].name} if len(found) == 1 else row


def _distinct(rows: Sequence[dict[str, Any]], value: str) -> list[dict[str, Any]]:
    """One row a place: the highest, which is the best learning rate of a probe."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("run", "step", "t", "depth", "features"))
        if key not in best or row[value] > best[key][value]:
            best[key] = row
    return list(best.values())
