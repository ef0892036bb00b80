"""Results of `repa evaluate` read back as evaluations of the runs that the samples are of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.report.protocols import INCEPTION, renamed
from repa.report.records import RunRecord, with_evaluations
from repa.runs import layout

OTHER_WEIGHTS = "inception with weights that are not the published ones"


class OtherSamples(NamedTuple):
    """An evaluation of samples that are of none of the runs: published ones, or of a run that is not in the report."""

    name: str
    row: dict[str, Any]


def add_evaluations(
    records: Sequence[RunRecord], results: Sequence[str | Path] = ()
) -> tuple[list[RunRecord], list[OtherSamples]]:
    """The runs with the evaluations in their folders and in the files given, and what those files hold of other samples.

    Raises:
        UserError: a file is damaged or no results; one in a run's folder does not say which step it is of.
    """
    known = {run.path.resolve(): run for run in records}
    found: dict[Path, list[dict[str, Any]]] = {path: [] for path in known}
    others = []
    for run in records:
        for file in sorted((run.path / layout.EVALUATIONS).glob("*.json")):
            row = evaluation_row(file)
            if row["step"] is None:
                raise UserError(
                    f"{file} does not say which checkpoint its samples are of: move it out of {layout.EVALUATIONS}, "
                    "and name it with --results."
                )
            found[run.path.resolve()].append(_decoded(row, run))
    for file in map(Path, results):
        row = evaluation_row(file)
        folder = Path(row["run"]).resolve() if row["run"] else None
        if folder in known and row["step"] is not None:
            found[folder].append(_decoded(row, known[folder]))
        else:
            name = folder.name if folder else Path(row["samples"]).name
            others.append(OtherSamples(name, row))
    return [with_evaluations(run, found[run.path.resolve()]) for run in records], others


def evaluation_row(file: Path) -> dict[str, Any]:
    """A results file as a row of metrics: its figures, the step, and how they were made; `step` and `run` may be None."""
    results = read_json(file)
    metrics = results.get("metrics") if isinstance(results, dict) else None
    if not isinstance(metrics, dict) or "features" not in results:
        raise UserError(
            f"{file} holds no results of `repa evaluate`: it has no metrics, or not whose features they are in."
        )
    made, judge = (results.get(key) or {} for key in ("made", "encoder"))
    arithmetic = (results.get("arithmetic") or {}).get("neighbours")
    features, published = results["features"], judge.get("published")
    return {
        "kind": "eval",
        "step": made.get("step") if isinstance(made.get("step"), int) else None,
        **renamed(metrics),
        "features": OTHER_WEIGHTS if features == INCEPTION and published is False else features,
        "judge_weights": None if published else str(judge.get("weights_sha256") or "")[:8] or None,
        "reference": Path(str(results.get("reference"))).name,
        "num_samples": results.get("num_samples"),
        **{
            key: made.get(key)
            for key in ("labels", "sampler", "steps", "nfe", "guidance", "weak_sha256", "guide_image_sha256", "weights")
        },
        "decoder": made.get("decoder") or made.get("autoencoder"),
        "neighbours": None if arithmetic == "float32" else arithmetic,
        "file": file.name,
        "run": made.get("run"),
        "samples": str(results.get("samples")),
    }


def _decoded(row: dict[str, Any], run: RunRecord) -> dict[str, Any]:
    """Samples whose file names no decoder were decoded by the run's own autoencoder."""
    return {**row, "decoder": row["decoder"] or run.config.get("autoencoder") or None}
