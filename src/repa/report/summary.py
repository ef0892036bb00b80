"""The figures of the report: the speed-up and the summary table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

from repa.base import faults
from repa.report.configs import alignment_text
from repa.report.runs import Protocol, RunRecord, common_protocol, is_number, read_runs
from repa.report.text import count, duration, figure
from repa.runs import layout

NONE = "–"
TAIL = 0.1  # final training figures are means over this last part of the logged rows


@dataclass(frozen=True)
class Reached:
    """Where a run first had a Fréchet distance."""

    step: float
    seconds: float | None
    between: tuple[int, int]  # the evaluations it was interpolated between; equal where an evaluation itself had it
    is_bound: bool = False  # the very first evaluation was there already: it may have happened earlier


@dataclass(frozen=True)
class Speedup:
    """How soon an aligned run had the baseline's final Fréchet distance, linearly interpolated between evaluations."""

    target: float  # the baseline's final Fréchet distance
    protocol: Protocol
    baseline_final: dict[str, Any]  # the evaluation it is from
    baseline: Reached  # where the baseline itself FIRST had it: earlier than its end when its curve is not monotone
    aligned: Reached | None  # None: not reached
    aligned_best: dict[str, Any]  # the aligned run's lowest evaluation
    aligned_final: dict[str, Any]

    @property
    def times_steps(self) -> float | None:
        """Baseline's steps over the aligned run's, both to the first time; above 1 means fewer. None when undefined."""
        return _ratio(self.baseline.step, self.aligned.step) if self.aligned else None

    @property
    def times_seconds(self) -> float | None:
        """The same in seconds of training as the runs logged them."""
        return _ratio(self.baseline.seconds, self.aligned.seconds) if self.aligned else None


def speedup(baseline: RunRecord | Path, aligned: RunRecord | Path) -> Speedup | None:
    """When the aligned run first had the baseline's final Fréchet distance, linearly interpolated between evaluations.

    Returns:
        None when the two share no way of evaluating (features, number of samples, sampler, NFE, weights, ...); of several
        the one of most evaluations is taken. Otherwise a `Speedup`, whose `aligned` is None when the distance was not reached.
    """
    baseline, aligned = read_runs([baseline, aligned])
    common = [protocol for protocol in baseline.protocols if protocol in aligned.protocols]
    if not common:
        return None
    protocol = max(common, key=lambda p: min(len(run.distances(p)) for run in (baseline, aligned)))
    rows, aligned_rows = baseline.distances(protocol), aligned.distances(protocol)
    target = rows[-1]["frechet_distance"]
    first = first_reached(rows, target)
    assert first is not None  # its last evaluation is at the target
    best = min(aligned_rows, key=lambda row: row["frechet_distance"])
    return Speedup(target, protocol, rows[-1], first, first_reached(aligned_rows, target), best, aligned_rows[-1])


def first_reached(rows: Sequence[dict[str, Any]], target: float) -> Reached | None:
    """Where the piecewise linear curve through evaluations (by step) first is at or below `target`, if anywhere."""
    previous = None
    for row in rows:
        if row["frechet_distance"] <= target:
            if previous is None:
                return Reached(row["step"], row.get("seconds"), (row["step"], row["step"]), is_bound=True)
            drop = previous["frechet_distance"] - row["frechet_distance"]
            part = (previous["frechet_distance"] - target) / drop  # in (0, 1]: previous is above the target, row is not
            between = (row["step"], row["step"]) if part == 1 else (previous["step"], row["step"])
            return Reached(_mix(previous, row, "step", part), _mix(previous, row, "seconds", part), between)
        previous = row
    return None


def summary_rows(runs: Sequence[Path | RunRecord]) -> list[dict[str, Any]]:
    """One dictionary per run, the columns of the summary table; None where a run has no such figure.

    `frechet_distance` is the last that was made as most runs' were (`protocol`), None where a run has none such. Final
    `denoising` and `alignment` (negative loss per alignment) are means over the last tenth of the logged rows,
    `images_per_second` is the median, `speedup` compares with the first run that was trained without alignment, or with
    its like of the same seed.
    """
    records = read_runs(runs)
    rows, protocol = [], common_protocol(records)
    for run in records:
        baseline = baseline_of(records, run)
        distances = run.distances(protocol) if protocol is not None else []
        last = distances[-1] if distances else {}
        seconds = [row["seconds"] for row in [*run.train, *run.evals] if is_number(row.get("seconds"))]
        rates = run.series("images_per_second")[1]
        rows.append(
            {
                "name": run.name,
                "path": run.path,
                "alignments": [alignment_text(item) for item in run.alignments],
                "frechet_distance": last.get("frechet_distance"),
                "frechet_step": last.get("step"),
                "protocol": protocol if distances else None,
                "speedup": speedup(baseline, run) if baseline is not None and run.is_aligned else None,
                "denoising": _tail(run.series("denoising")[1]),
                "alignment": {name: _tail(run.series(f"alignment/{name}")[1]) for name in run.alignment_names},
                "steps": run.steps,
                "seconds": max(seconds, default=None),
                "images_per_second": median(rates) if rates else None,
                "parameters": num_parameters(run.path),
            }
        )
    return rows


def summary_table(runs: Sequence[Path | RunRecord]) -> list[dict[str, str]]:
    """The summary as text, heading -> cell, for a terminal; columns that no run can fill are left out."""
    table = [
        {
            "run": row["name"],
            "aligned to": "; ".join(row["alignments"]) or "nothing",
            "Fréchet distance": _text(row["frechet_distance"], figure),
            "steps to the baseline's": reached_text(row["speedup"]),
            "denoising loss": _text(row["denoising"], "{:.4f}".format),
            "alignment": ", ".join(f"{value:.3f}" for value in row["alignment"].values() if value is not None) or NONE,
            "steps": count(row["steps"]),
            "time": _text(row["seconds"], duration),
            "images/s": _text(row["images_per_second"], figure),
        }
        for row in summary_rows(runs)
    ]
    return [{key: cell for key, cell in row.items() if any(other[key] != NONE for other in table)} for row in table]


def reached_text(found: Speedup | None) -> str:
    """'566', '≤ 200' when the first evaluation was there already, 'not reached', or a dash when nothing is compared."""
    if found is None:
        return NONE
    if found.aligned is None:
        return "not reached"
    return f"≤ {count(found.aligned.step)}" if found.aligned.is_bound else count(found.aligned.step)


def baseline_of(records: Sequence[RunRecord], run: RunRecord | None = None) -> RunRecord | None:
    """The first run trained without alignment; for `run` its like of the same seed, where there is one."""
    first = next((each for each in records if not each.is_aligned), None)
    if first is None or run is None or run.seed == first.seed:
        return first
    changed = {**first.config, "seed": run.seed}
    return next((each for each in records if each.config == changed and each.data == first.data), first)


def num_parameters(run: Path) -> int | None:
    """How many numbers the newest checkpoint's network holds, from the file's header; None without a checkpoint."""
    from safetensors import safe_open

    steps = layout.checkpoint_steps(run)
    file = layout.checkpoint_folder(run, steps[-1]) / layout.MODEL_FILE if steps else None
    if file is None or not file.is_file():
        return None
    damaged = faults.reading(file, "a safetensors file", f"Remove {file.parent}, or leave this run out.")
    with damaged, safe_open(file, "numpy") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - not a mapping


def _tail(values: Sequence[float]) -> float | None:
    return fmean(values[-max(1, round(len(values) * TAIL)) :]) if values else None


def _text(value: float | None, words: Callable[[float], str]) -> str:
    return NONE if value is None else words(value)


def _mix(a: dict[str, Any], b: dict[str, Any], key: str, part: float) -> float | None:
    return a[key] + part * (b[key] - a[key]) if is_number(a.get(key)) and is_number(b.get(key)) else None


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
