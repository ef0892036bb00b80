"""The tables next to the curves: one row per run, settings that differ, facts on data and machine."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from statistics import fmean, median
from typing import Any

from repa.base import faults
from repa.base.config import leaves
from repa.base.errors import printable
from repa.base.reporting import duration
from repa.report.runs import RunRecord, common_protocol, is_number, read_runs
from repa.report.speedups import Speedup, baseline_of, speedup
from repa.report.style import count, short_number
from repa.runs import layout

DASH = "–"
TAIL = 0.1  # final training values are means over this last share of the log entries


def summary_rows(runs: Sequence[Path | RunRecord]) -> list[dict[str, Any]]:
    """One dictionary per run, with the columns of the summary table; None for a missing value.

    `frechet_distance` is the last that was made as most runs' were (`protocol`), None where a run has none such. Final
    `denoising` and `alignment` (negative loss per alignment) are means over the last tenth of the logged rows,
    `images_per_second` is the median, `speedup` compares with the first run that was trained without alignment, or with
    its like of the same seed.
    """
    records = read_runs(runs)
    rows, protocol = [], common_protocol(records)
    for run in records:
        baseline = baseline_of(records, run)
        distances = run.distances(protocol)
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
                "denoising": _final_mean(run.series("denoising")[1]),
                "alignment": {name: _final_mean(run.series(f"alignment/{name}")[1]) for name in run.alignment_names},
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
            "Fréchet distance": _text_or_dash(row["frechet_distance"], short_number),
            "steps to the baseline's": reached_text(row["speedup"]),
            "denoising loss": _text_or_dash(row["denoising"], "{:.4f}".format),
            "alignment": ", ".join(f"{value:.3f}" for value in row["alignment"].values() if value is not None) or DASH,
            "steps": count(row["steps"]),
            "time": _text_or_dash(row["seconds"], duration),
            "images/s": _text_or_dash(row["images_per_second"], short_number),
        }
        for row in summary_rows(runs)
    ]
    return [{key: cell for key, cell in row.items() if any(other[key] != DASH for other in table)} for row in table]


def reached_text(found: Speedup | None) -> str:
    """'566', '≤ 200' if the first evaluation had already reached it, 'not reached', or a dash without a comparison.

    The text also says if the curve rises above the distance again, ends above the baseline, or has too few evaluations: one
    early point is not a speed-up.
    """
    if found is None:
        return DASH
    if found.aligned is None:
        return "not reached"
    if found.is_too_coarse or not found.overlap.steps:
        return "too few evaluations"
    step = f"≤ {count(found.aligned.step)}" if found.aligned.is_bound else count(found.aligned.step)
    return step if found.is_supported else f"{step}, not kept"


def alignment_text(item: dict[str, Any]) -> str:
    """'dinov2-b@8, weight 0.5, cosine, mlp' from one entry of `alignments`."""
    target, depth = item.get("target"), item.get("depth")
    parts = [f"{target}@{depth}", f"weight {item['weight']:g}" if is_number(item.get("weight")) else None]
    parts += [item.get("loss"), item.get("projector")]
    parts += [
        item.get(key) for key, plain in (("schedule", "constant"), ("token_norm", "none")) if item.get(key) != plain
    ]
    return ", ".join(str(part) for part in parts if part)


def config_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) for every setting that differs between runs."""
    configs = [leaves(run.config) for run in records]
    names = dict.fromkeys(name for each in configs for name in each)
    table = [(name, [_setting_text(each.get(name)) for each in configs]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def _setting_text(value: Any) -> str:
    return "–" if value is None or value == [] or value == {} else str(value)


def machine_facts() -> dict[str, str]:
    """Versions, processor and threads of this process: pass them as `facts` when the runs were made on this machine."""
    import torch

    from repa import __version__

    facts = {"Python": platform.python_version(), "torch": torch.__version__, "repa": __version__}
    facts["Processor"] = _processor()
    facts["Threads"] = f"{torch.get_num_threads()} used by torch, {os.cpu_count()} present"
    if torch.cuda.is_available():
        facts["GPU"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def data_facts(records: Sequence[RunRecord]) -> dict[str, str]:
    """The training data of the runs, from data.json; if runs differ, one entry per run with its name."""
    described = {run.name: _describe_data(run.data) for run in records if run.data}
    keys = dict.fromkeys(key for each in described.values() for key in each)
    facts = {}
    for key in keys:
        values = {name: each[key] for name, each in described.items() if key in each}
        same = len(set(values.values())) == 1
        facts[key] = next(iter(values.values())) if same else "; ".join(f"{name}: {v}" for name, v in values.items())
    return facts


def _describe_data(data: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if data.get("source") is not None:
        facts["Source"] = _identity_text(data["source"])
    if data.get("num_images") is not None:
        # num_images counts mirrored copies, class_counts does not
        images = sum(filter(is_number, data.get("class_counts", ()))) or data["num_images"]
        facts["Images"] = count(images) + (", and a mirrored copy of each" if images < data["num_images"] else "")
    if data.get("resolution") is not None:
        facts["Resolution"] = f"{data['resolution']} × {data['resolution']} pixels"
    names = data.get("class_names") or []
    if names:
        shown = ", ".join(printable(str(name)) for name in names[:12])
        facts["Classes"] = f"{len(names)}: {shown}{', …' if len(names) > 12 else ''}"
    for key, label in (("autoencoder", "Autoencoder"), ("features", "Alignment features")):
        if data.get(key):
            facts[label] = _identity_text(data[key])
    return facts


def _identity_text(value: Any) -> str:
    # An identity: the name, and a checksum that distinguishes it from others of that name.
    if isinstance(value, Mapping) and "name" in value:
        checksums = [str(item)[:12] for key, item in value.items() if key.endswith("sha256") and item]
        seed = f", seed {value['seed']}" if "seed" in value else ""
        return f"{value['name']}{seed}" + (f", checksum {' '.join(checksums)}" if checksums else "")
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key} ({_identity_text(item)})" if item or item == 0 else str(key) for key, item in value.items()
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(_identity_text(item) for item in value)
    return str(value)


def _processor() -> str:
    """The processor's name on Linux, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_parameters(run: Path) -> int | None:
    """Number of parameters of the newest checkpoint's network, from the file's header; None without a checkpoint."""
    from safetensors import safe_open

    steps = layout.checkpoint_steps(run)
    found = layout.part_files(layout.checkpoint_folder(run, steps[-1]), layout.MODEL_FILE) if steps else []
    num = 0
    # Reads only headers, so large runs do not slow the page down.
    for file in found:
        damaged = faults.reading(file, "a safetensors file", f"Remove {file.parent}, or leave this run out.")
        with damaged, safe_open(file, "numpy") as tensors:
            num += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118 - not a mapping
    return num if found else None


def _final_mean(values: Sequence[float]) -> float | None:
    return fmean(values[-max(1, round(len(values) * TAIL)) :]) if values else None


def _text_or_dash(value: float | None, words: Callable[[float], str]) -> str:
    return DASH if value is None else words(value)
