"""The command `repa analyse WHAT`: files, tables and errors."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from repa.cli import analyse, tables
from repa.cli.main import run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def read(path):
    """The rows of a .json; the .csv next to it must contain the same."""
    told = json.loads(path.read_text())
    with open(path.with_suffix(".csv")) as file:
        again = list(csv.DictReader(file))
    shown = [{key: "" if row.get(key) is None else str(row[key]) for key in again[0]} for row in told["rows"]]
    assert shown == again
    return told, told["rows"]


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def refused(capsys, *words):
    assert run(["analyse", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_cknna_of_two_checkpoints_writes_rows_and_a_table(random_run, data_folder, tmp_path, capsys):
    words = [
        "analyse",
        "cknna",
        str(random_run),
        "--data",
        str(data_folder),
        "--times",
        "0",
        "0.5",
        "--neighbours",
        "5",
    ]
    assert run([*words, "--checkpoints", "10", "20", "--out", "found/c.json"]) == 0
    told, rows = read(tmp_path / "found/c.json")
    assert [(row["step"], row["t"], row["depth"]) for row in rows] == [
        (step, t, depth) for step in (10, 20) for t in (0.0, 0.5) for depth in (1, 2)
    ]
    assert all(row["run"] == "random" and -0.1 < row["cknna"] <= 1 for row in rows)
    assert rows[0]["cknna"] != rows[4]["cknna"]
    assert told["analysis"] == "cknna"
    assert told["variant"] == "paper"
    assert (told["num_images"], told["chance"]) == (40, 5 / 40)
    assert picture(tmp_path / "found/c.png").std() > 10
    out = capsys.readouterr().out
    assert f"{rows[-1]['cknna']:.4f}" in out.splitlines()[8]
    assert (random_run / "analysis" / "cache").is_dir()


def test_cka_is_written_into_the_run_by_default(random_run, data_folder):
    words = [
        "analyse",
        "cknna",
        str(random_run),
        "--data",
        str(data_folder),
        "--measure",
        "cka-unbiased",
        "--depths",
        "2",
    ]
    assert run(words) == 0
    told, rows = read(random_run / "analysis" / "cka-unbiased-tiny.json")
    assert told["analysis"] == "cka-unbiased"
    assert [(row["step"], row["depth"]) for row in rows] == [(20, 2)]  # of the newest checkpoint


def test_cknna_variants_have_different_names(random_run, data_folder, capsys):
    words = ["analyse", "cknna", str(random_run), "--data", str(data_folder), "--neighbours", "5", "--depths", "2"]
    assert run(words) == 0
    assert "platonic" not in capsys.readouterr().out
    assert run([*words, "--variant", "platonic"]) == 0
    assert "CKNNA (platonic)" in capsys.readouterr().out
    for name, variant in (("cknna-tiny", "paper"), ("cknna-platonic-tiny", "platonic")):
        assert read(random_run / "analysis" / f"{name}.json")[0]["variant"] == variant


def test_a_probe_of_a_run_and_an_encoder_writes_both(random_run, data_folder, tmp_path, capsys):
    words = ["analyse", "probe", str(random_run), "tiny", "--data", str(data_folder), "--val", str(data_folder)]
    assert run([*words, "--times", "0", "--learning-rates", "1e-9", "0.01", "--epochs", "20", "--out", "p.json"]) == 0
    told, rows = read(tmp_path / "p.json")
    assert told["chance"] == 0.5  # of two classes of twenty images each
    assert [(row["run"], row["depth"], row.get("features"), row["lr"]) for row in rows] == [
        ("random", 1, None, 1e-9), ("random", 1, None, 0.01), ("random", 2, None, 1e-9), ("random", 2, None, 0.01),
        ("tiny", None, "patches", 1e-9), ("tiny", None, "patches", 0.01),
        ("tiny", None, "pooled", 1e-9), ("tiny", None, "pooled", 0.01),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "best of 2 learning rates on the test images" in out
    assert len([line for line in out.splitlines() if line.startswith(("random", "tiny"))]) == 4
    assert picture(tmp_path / "p.png").std() > 10


def test_a_probe_of_only_an_encoder_has_no_run_columns(data_folder, tmp_path, capsys):
    words = ["analyse", "probe", "tiny", "--data", str(data_folder), "--val", str(data_folder), "--epochs", "1"]
    assert run([*words, "--learning-rates", "0.01", "--out", "p.json"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["run", "features", "top-1"]


def test_encoders_are_compared_with_each_other(data_folder, tmp_path, capsys):
    words = ["analyse", "encoders", str(data_folder), "--encoders", "tiny", "tiny-classifier", "--neighbours", "5"]
    assert run([*words, "--epochs", "2", "--out", "e.json"]) == 0
    _, (first, second) = read(tmp_path / "e.json")
    assert first["cknna.tiny-classifier"] == second["cknna.tiny"]
    assert first["cknna.tiny"] is None
    out = capsys.readouterr().out
    assert "fp16 B/image" in out
    assert f"{first['cknna.tiny-classifier']:.4f}" in out


def test_pictures_and_progress_are_drawn(random_run, data_folder, tmp_path, capsys):
    words = ["analyse", "pictures", str(random_run), "--data", str(data_folder), "--depths", "2"]
    assert run([*words, "--num-images", "3", "--out", "a.png"]) == 0
    assert run([*words, "--encoders", "--times", "0", "--images", "0", "39", "5", "--out", "b.png"]) == 0
    wide, narrow = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    assert wide.shape[1] > narrow.shape[1]  # image, tiny, block 2 twice; image, block 2
    assert wide.shape[0] > 300
    progress = ["analyse", "progress", str(random_run), "--steps", "2", "--num-images", "2", "--sampler", "euler"]
    assert run([*progress, "--guidance", "cfg:scale=1.5"]) == 0
    two = picture(random_run / "analysis" / "progress.png")
    assert run([*progress, "--checkpoints", "20", "--out", "one.png"]) == 0
    one = picture(tmp_path / "one.png")
    assert two.shape[0] > 1.6 * one.shape[0]  # a row for each checkpoint
    assert "2 checkpoints, 2 samples each" in capsys.readouterr().out


def test_neighbours_of_a_file_of_samples(data_folder, tmp_path, capsys):
    from repa.data import open_data

    images = open_data(data_folder).gather("images", np.arange(3, 7)).transpose(0, 2, 3, 1)
    np.savez(tmp_path / "s.npz", arr_0=images)
    assert (
        run(["analyse", "neighbours", "s.npz", "--data", str(data_folder), "--neighbours", "2", "--out", "n.json"]) == 0
    )
    told, rows = read(tmp_path / "n.json")
    assert [row["nearest"] for row in rows] == [3, 4, 5, 6]
    assert told["verdict"]["share_near"] == 1
    assert "100.0 % of the samples" in capsys.readouterr().out
    assert picture(tmp_path / "n.png").std() > 10


def test_neighbours_of_a_runs_samples_are_written_into_the_run(random_run, data_folder, tmp_path):
    sample = ["sample", str(random_run), "--num-images", "3", "--sampler", "euler", "--steps", "1", "--out", "s.npz"]
    assert run(sample) == 0
    compare = ["analyse", "neighbours", "s.npz", "--data", str(data_folder), "--neighbours", "2"]
    assert run(compare) == 0
    _, rows = read(random_run / "analysis" / "neighbours.json")
    assert len(rows) == 3
    assert not (tmp_path / "neighbours.json").exists()
    (tmp_path / "s.json").unlink()  # of samples whose run is not known
    assert run(compare) == 0
    assert read(tmp_path / "neighbours.json")[1] == rows


def test_mistakes_give_one_line_errors(random_run, data_folder, tmp_path, capsys):
    run_, data = str(random_run), str(data_folder)
    assert "'cknn'" in refused(capsys, "cknn")
    assert "Did you mean 'cknna'" in refused(capsys, "cknn")
    assert "needs RUNS (run folders)" in refused(capsys, "cknna", "--data", data)
    assert "run folders, or encoders by name" in refused(capsys, "probe", "--data", data)
    assert "is not a run folder" in refused(capsys, "cknna", tmp_path, "--data", data)
    for what in (["pictures", "runs/x", "--data", data], ["progress", "runs/x"]):
        assert "runs/x is not a run folder" in refused(capsys, *what)
        assert not (tmp_path / "runs").exists()
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, "encoders", data, "--out", "file/e.json")
    assert "no checkpoint of step 15: choose one of 10, 20" in refused(
        capsys, "cknna", run_, "--data", data, "--checkpoints", 15
    )
    assert "encoder 'tinny'" in refused(capsys, "cknna", run_, "--data", data, "--encoder", "tinny")
    assert "There is no run folder runs/x" in refused(capsys, "probe", "runs/x", "--data", data)
    assert "has no run folder to write to" in refused(capsys, "probe", "tiny", "--data", data)
    assert "holds no prepared data" in refused(capsys, "cknna", run_, "--data", tmp_path)
    assert "does not end in .json" in refused(capsys, "cknna", run_, "--data", data, "--out", "x.txt")
    assert "does not end in .png" in refused(capsys, "pictures", run_, "--data", data, "--out", "x.json")
    assert "times" in refused(capsys, "pictures", run_, "--data", data, "--times", "2")
    assert "has no image 40" in refused(capsys, "pictures", run_, "--data", data, "--images", "40")
    assert "no option --depth" in refused(capsys, "probe", run_, "--data", data, "--depth", "1")
    np.savez(tmp_path / "s.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    assert "8x8 pixels" in refused(capsys, "neighbours", "s.npz", "--data", data)


def test_every_analysis_has_help(capsys):
    assert run(["analyse"]) == 0
    words = capsys.readouterr().out.split()
    assert set(analyse.WHATS) <= set(words)
    for what in analyse.WHATS:
        with pytest.raises(SystemExit) as end:
            run(["analyse", what, "--help"])
        assert end.value.code == 0
        assert f"repa analyse {what}" in capsys.readouterr().out


def test_undefined_values_are_empty_in_the_files(tmp_path):
    tables.write(
        tmp_path / "x.json", {"analysis": "cknna"}, [{"depth": 1, "cknna": float("nan")}, {"depth": 2, "cknna": 0.5}]
    )
    assert "NaN" not in (tmp_path / "x.json").read_text()
    assert (tmp_path / "x.csv").read_text() == "depth,cknna\n1,\n2,0.5\n"


def test_columns_are_aligned_and_missing_values_are_dashes():
    rows = [{"a": "x", "b": 1.0}, {"a": "long", "b": None, "c": 3}]
    assert tables.in_columns(rows, {"a": "name", "b": "value|.2f"}) == ["name  value", "x      1.00", "long      -"]
