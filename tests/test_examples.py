"""The examples run and learn."""

import json
from pathlib import Path
from statistics import fmean

import torch
from examples import accelerate_loop, diffusers_lora, your_own_loop
from safetensors.torch import load_file

EXAMPLES = Path(your_own_loop.__file__).parent


def test_the_plain_loop_example_learns_both_losses():
    history = your_own_loop.main(num_steps=40)
    denoising, aligned = zip(*history, strict=True)
    assert fmean(denoising[-5:]) < 0.9 * fmean(denoising[:5])
    assert fmean(aligned[-5:]) < fmean(aligned[:5]) - 0.1
    assert all(-1 <= value <= 1 for value in aligned)  # a negative mean cosine


def test_alignment_takes_fewer_than_fifteen_lines_of_the_plain_loop():
    lines = (EXAMPLES / "your_own_loop.py").read_text().splitlines()
    assert 1 <= sum("  # +" in line for line in lines) < 15


def test_the_lora_example_learns_both_losses(tmp_path):
    history = diffusers_lora.main(num_steps=24, out=tmp_path)
    denoising, aligned = zip(*history, strict=True)
    assert fmean(denoising[-5:]) < 0.9 * fmean(denoising[:5])
    assert fmean(aligned[-5:]) < fmean(aligned[:5])
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights
    assert all("lora" in name for name in weights)


def test_the_accelerate_example_resumes(tmp_path):
    whole = accelerate_loop.main(tmp_path / "whole", num_epochs=2)
    first = accelerate_loop.main(tmp_path / "parts", num_epochs=1)
    assert first == whole[:4]
    second = accelerate_loop.main(tmp_path / "parts", num_epochs=1)
    assert first + second == whole
    state = load_file(tmp_path / "parts" / "state" / "model_1.safetensors")
    assert json.loads(bytes(state["_extra_state"].tolist()))["steps"] == 8


def test_the_notebook_runs(monkeypatch):
    cells = json.loads((EXAMPLES / "alignment.ipynb").read_text())["cells"]
    shown, names = [], {"display": lambda value: shown.append(value)}
    torch.manual_seed(0)
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["history"][-1] < names["history"][0]
    assert any(hasattr(value, "_repr_html_") for value in shown)
