"""`repa train` on data at a URL: a stopped and resumed run equals an uninterrupted one bit for bit."""

from pathlib import Path

import torch

from repa.cli.main import run
from repa.runs import load_checkpoint


def test_training_on_a_url_resumes_exactly(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))

    def train(out: Path, num_steps: int) -> int:
        return run([
            "train", "quickstart-repa", "--data", f"file://{data_folder}", "--out", str(out), "--preview.every", "0",
            "--model.hidden-dim", "32", "--model.depth", "2", "--alignments.0.depth", "1", "--batch-size", "8",
            "--save-every", "4", "--num-steps", str(num_steps),
        ])  # fmt: skip

    assert train(tmp_path / "whole", 8) == 0
    assert train(tmp_path / "parts", 4) == 0
    assert train(tmp_path / "parts", 8) == 0
    whole, parts = (load_checkpoint(tmp_path / name).model for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert list((tmp_path / "cache" / "streams").glob("*/features.tiny-*.npy"))
    assert not list((tmp_path / "cache" / "streams").glob("*/pooled.tiny-*.npy"))
