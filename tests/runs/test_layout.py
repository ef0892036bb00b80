"""Which files training removes from a run folder."""

import errno
import os

import pytest

from repa.runs import layout


def test_tidying_removes_only_files_that_training_writes(tmp_path):
    gone = [
        ".config.yaml.abcdefgh.tmp",
        ".metrics.jsonl.abcdefgh.tmp",
        "samples/.0000010.png.abcdefgh.tmp",
        "checkpoints/.0000010.abcdefgh.tmp/model.safetensors",
        "checkpoints/.0000008.gfedcba_.tmp/model.safetensors",
        "snapshots/.0000010.abcdefgh.tmp/ema.safetensors",
        "averages/.0000010.abcdefgh.tmp/ema-width-0.1.safetensors",
    ]
    stays = [
        ".samples.npz.abcdefgh.tmp",
        "samples/.mine.npz.abcdefgh.tmp",
        "averages/0000010/.ema-width-0.1.safetensors.abcdefgh.tmp",
        "evaluations/.0000010.json.abcdefgh.tmp",
        "checkpoints/0000010/model.safetensors",
    ]
    for name in [*gone, *stays]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    layout.tidy(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(stays)


def test_weights_that_may_not_be_listed_are_not_taken_for_missing(tmp_path, monkeypatch):
    assert layout.part_files(tmp_path / "none", layout.EMA_FILE) == []

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(PermissionError):
        layout.part_files(tmp_path, layout.EMA_FILE)
