"""Run folders with known figures, in the format of training."""

import json
from pathlib import Path

import numpy as np
import yaml

from repa.runs import layout

ALIGNMENT = {"target": "tiny", "depth": 3, "weight": 0.5, "loss": "cosine", "projector": "mlp:width=256"}
PROTOCOL = {"features": "tiny-classifier", "num_samples": 1000, "nfe": 20, "weights": "ema"}


def config(aligned: bool, **changes) -> dict:
    return {
        "model": {"name": "SiT-T/2", "depth": 6},
        "alignments": [ALIGNMENT] if aligned else [],
        "optimizer": {"learning_rate": 1e-4},
        "seed": 0,
        **changes,
    }


def fake_run(
    folder: Path,
    *,
    aligned: bool = False,
    distances: dict[int, float] | None = None,
    num_steps: int = 100,
    seconds_per_step: float = 0.5,
    previews: tuple[int, ...] = (),
    data: dict | None = None,
    settings: dict | None = None,
    protocol: dict | None = None,
) -> Path:
    """A run with a row every 10 steps; `distances` maps steps of evaluations to Fréchet distances."""
    folder.mkdir(parents=True)
    (folder / layout.CONFIG).write_text(yaml.safe_dump(settings or config(aligned), sort_keys=False))
    data = data or {"source": {"kind": "shapes"}, "num_images": 60, "resolution": 8, "class_names": ["disc", "square"]}
    (folder / layout.DATA).write_text(json.dumps(data))
    rng = np.random.default_rng(int(aligned))
    lines = []
    for step in range(10, num_steps + 1, 10):
        row = {"kind": "train", "step": step, "seconds": step * seconds_per_step, "images_per_second": 64.0}
        row |= {"denoising": 1.0 + 5.0 / step + 0.05 * rng.standard_normal(), "loss": 1.0}
        if aligned:
            row["alignment"] = {"tiny@3": -0.4 - 0.001 * step}
        lines.append(row)
        if step in (distances or {}):
            evaluation = {"kind": "eval", "step": step, "seconds": step * seconds_per_step}
            lines.append(evaluation | {"frechet_distance": distances[step]} | (protocol or PROTOCOL))
    (folder / layout.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in previews:
        path = layout.preview(folder, step, ".npz")
        path.parent.mkdir(exist_ok=True)
        np.savez(path, arr_0=rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8), labels=np.arange(16) % 2)
    return folder


def results_file(path: Path, metrics: dict[str, float], made: dict | None, **changes) -> Path:
    """A file like that of `repa evaluate --out`, by default with the paper's protocol."""
    content = {
        "metrics": metrics, "num_samples": 50_000, "num_reference": None, "warnings": [], "samples": "s.npz", "made": made,
        "reference": "refs/VIRTUAL_imagenet256_labeled.npz", "reference_kind": "statistics", "features": "inception",
        "encoder": {"name": "inception", "weights_sha256": "6726825d0af5", "published": True},
        "arithmetic": {"features": "float32", "statistics": "float64", "neighbours": "float32"},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **changes}))
    return path


def made_by(run: Path, step: int, **changes) -> dict:
    """The record of `repa sample`, by default of the paper's samples without guidance."""
    made = {"run": str(run), "step": step, "weights": "ema", "num": 50_000, "sampler": "euler_maruyama", "steps": 250}
    return {**made, "guidance": [], "labels": "uniform", "seed": 0, "decoder": "sd-vae-ft-ema", **changes}


def analysis_file(run: Path, name: str, kind: str, rows: list[dict], **settings) -> Path:
    """Write a file like those of `repa analyse` into the run's folder."""
    path = run / layout.ANALYSIS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"analysis": kind, "data": "d", "num_images": 100, **settings, "rows": rows}))
    return path
