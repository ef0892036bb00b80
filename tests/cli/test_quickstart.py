"""`repa quickstart` with small versions of its recipes, from images to the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from repa import recipes
from repa.cli import quickstart
from repa.cli.main import run
from repa.cli.together import run_together
from repa.runs import layout, read_metrics

SMALL = {
    "model": {"name": "SiT-S/8", "hidden_dim": 16, "depth": 2, "num_heads": 1},
    "batch_size": 8,
    "num_steps": 4,
    "save_every": 2,
    "log_every": 1,
    "preview": {"every": 2, "num_images": 4, "num_scored": 12, "num_steps": 2},
}


@pytest.fixture
def small_recipes(monkeypatch, tmp_path):
    """Files that replace the two recipes: trainings run in other processes, which monkeypatching does not reach."""
    runs = {}
    for name, recipe in quickstart.RUNS.items():
        whole = recipes.RECIPES[recipe]()
        alignments = [{**whole.alignments[0].model_dump(), "depth": 1, "projector": "linear"}]
        runs[name] = str(tmp_path / f"{recipe}.yaml")
        (tmp_path / f"{recipe}.yaml").write_text(whole.override(**SMALL, alignments=alignments).to_yaml())
    monkeypatch.setattr(quickstart, "RUNS", runs)


def table_of(said):
    """The rows of the report's table, keyed by column heading."""
    rows = [line for line in said.splitlines() if "│" in line or "┃" in line]
    assert {"aligned to", "steps"} <= {row.strip("│┃ ").partition("  ")[0].strip() for row in rows}
    return rows


def test_the_quickstart_goes_from_images_to_a_report(small_recipes, image_folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "quick"
    source = shutil.copytree(image_folder, tmp_path / "images")
    next(source.rglob("*.png")).with_suffix(".txt").write_text("a picture")
    command = ["quickstart", "--source", str(source), "--out", str(out)]
    assert run(command) == 0
    for name in ("baseline", "aligned"):
        rows = list(read_metrics(out / name))
        assert [row["step"] for row in rows if row["kind"] == "eval"] == [2, 4]
        assert all(row["frechet_distance"] > 0 for row in rows if row["kind"] == "eval")
        assert all(set(row["alignment"]) == {"tiny@1"} for row in rows if row["kind"] == "train")
        assert layout.preview_steps(out / name) == [2, 4]
        assert np.load(layout.preview(out / name, 4, ".npz"))["labels"].tolist() == [0, 1, 0, 1]
    rows = {
        name: [row for row in read_metrics(out / name) if row["kind"] == "train"] for name in ("baseline", "aligned")
    }
    first = {name: rows[name][0]["denoising"] for name in rows}
    assert first["baseline"] == pytest.approx(first["aligned"], rel=1e-6)  # same network, batch, noise and times

    page = (out / "report.html").read_text()
    assert "baseline" in page
    assert "aligned" in page
    assert f"quickstart --out {out}" in page
    assert "--preview.features lite0" in page
    assert "Last samples of aligned: " in page  # followed by a class name
    assert f"repa train {tmp_path}/quickstart-repa.yaml" in page
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "40 images of 2 classes" in said
    assert "32 pixels, from sides of about" in said
    assert "features of lite0" in said
    assert f"repa train quickstart-text --data {out}/data --out {out}/text" in said  # because of the caption

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr(quickstart, "run_together", None)  # the second call has nothing to do
    monkeypatch.setattr(quickstart, "_compute_reference", None)
    assert run(command) == 0
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = capsys.readouterr().out
    assert table_of(again) == table_of(said)
    assert "Both runs are complete" in again
    (out / "report.html").unlink()
    assert run(command) == 0
    assert "--preview.features lite0" in (out / "report.html").read_text()
    asked = []
    monkeypatch.setattr(quickstart, "run_together", lambda trainings: asked.extend(trainings) or 3)
    monkeypatch.setattr(quickstart, "_compute_reference", lambda data, extractor: None)
    assert run([*command, "--num-steps", "6"]) == 3  # more steps and another seed, so not finished
    assert run([*command, "--seed", "1"]) == 3
    assert "one evaluation" not in capsys.readouterr().out
    assert run([*command, "--num-steps", "2"]) == 0  # the runs are longer already
    assert "note: 2 steps have one evaluation, at the end" in capsys.readouterr().out
    assert len(asked) == 4
    assert json.loads((out / "data" / "manifest.json").read_text())["num_images"] == 2 * 40  # including mirrored copies


def test_an_empty_source_gives_a_one_line_error(small_recipes, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(["quickstart", "--source", str(tmp_path / "empty"), "--out", str(tmp_path / "q")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("repa: ")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_default_source_is_the_packaged_photographs(small_recipes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("repa.cli.quickstart.NUM_CROPS", 40)
    assert run(["quickstart", "--num-steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "20 classes" in said
    assert "quickstart FOLDER" in said
    assert (tmp_path / "quickstart" / "report.html").is_file()


@pytest.mark.slow
def test_a_signal_stops_both_trainings_with_a_checkpoint(small_recipes, image_folder, tmp_path):
    out = tmp_path / "quick"
    commands = [
        ["train", recipe, "--data", str(tmp_path / "data"), "--out", str(out / name), "--num-steps", "1000000"]
        for name, recipe in quickstart.RUNS.items()
    ]
    assert run(["prepare", str(image_folder), str(tmp_path / "data"), "--resolution", "32", "--features", "tiny"]) == 0
    code = f"import sys; from repa.cli.together import run_together; sys.exit(run_together({commands!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    while not all(layout.checkpoint_steps(out / name) for name in quickstart.RUNS):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    for name in quickstart.RUNS:
        last = list(read_metrics(out / name))[-1]["step"]
        assert layout.checkpoint_steps(out / name)[-1] == last < 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_quickstart_continues_bit_for_bit(small_recipes, image_folder, tmp_path):
    """SIGKILL reaches only the main process, and both trainings end with it."""
    command = ["quickstart", "--source", str(image_folder), "--num-steps", "12", "--out"]
    assert run([*command, str(tmp_path / "whole")]) == 0
    words = [*command, str(tmp_path / "killed")]
    code = f"from repa.cli import main, quickstart; quickstart.RUNS = {quickstart.RUNS!r}; main.run({words!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    trainings = [tmp_path / "killed" / name for name in quickstart.RUNS]
    while not all(layout.checkpoint_steps(training) for training in trainings):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert min(layout.checkpoint_steps(training)[-1] for training in trainings) < 12
    while run(words) == 2:  # a training keeps its lock until it ends, up to a second later
        time.sleep(0.2)
    for name in quickstart.RUNS:
        mine, yours = (layout.checkpoint_folder(tmp_path / where / name, 12) for where in ("whole", "killed"))
        assert {p.name: p.read_bytes() for p in mine.glob("*.safetensors")} == {
            p.name: p.read_bytes() for p in yours.glob("*.safetensors")
        }
        rows = [
            [(row["step"], row.get("denoising"), row.get("frechet_distance"))
             for row in read_metrics(tmp_path / where / name) if row["kind"] in ("train", "eval")]
            for where in ("whole", "killed")
        ]  # fmt: skip
        assert rows[0] == rows[1]


def test_the_exit_code_of_a_failed_training_is_returned(capfd):
    assert run_together([["show", "quickstart"], ["show", "quickstrat"]]) == 2
    # the other command may have been stopped before it printed anything
    assert "Did you mean 'quickstart'?" in capfd.readouterr().err
