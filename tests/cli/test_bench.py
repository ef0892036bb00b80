"""`repa bench` with a tiny recipe."""

import json

import pytest
import torch

from repa.base.device import PRODUCT_SIDE
from repa.base.errors import UserError
from repa.cli import bench
from repa.cli.main import run
from repa.performance import measure


@pytest.fixture
def recipe(tiny_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_config.to_yaml())
    return path


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    monkeypatch.setitem(PRODUCT_SIDE, "cpu", 64)


def test_a_recipe_is_measured_on_its_data(recipe, data_folder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    trace = tmp_path / "trace.json.gz"
    words = [
        "--data",
        str(data_folder),
        "--batch-size",
        "4",
        "8",
        "--rounds",
        "1",
        "--precision",
        "fp32",
        "bf16",
        "--out",
        str(out),
        "--trace",
        str(trace),
    ]
    assert run(["bench", str(recipe), *words]) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    kinds = [(row["batch_size"], row["precision"], row["features"]) for row in found["rows"]]
    assert sorted(kinds) == [(n, p, "cached") for n in (4, 8) for p in ("bf16", "fp32")]
    assert all(row["parts"]["data"] > 0 for row in found["rows"])
    assert printed.count("| SiT-S/4 |") == 4
    assert printed.count("Kernels: ") == 1  # only for the recipe's own step, whose timeline is stored
    assert trace.exists()
    assert all(sum(row["profile"]["categories"].values()) > 0 for row in found["rows"])
    assert "Next: " in printed or "No measured setting" in printed
    for gain, sentence in found["advice"]:
        assert gain >= 1.03
        assert sentence in printed


def test_without_data_the_batch_is_random_with_imagenets_size(recipe, tiny_config, capsys):
    recipe.write_text(tiny_config.override(diffusion={"shift": "auto", "contrastive": 0.05}).to_yaml())
    assert run(["bench", str(recipe), "--rounds", "1", "--precision", "fp32", "--token-width", "12"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| SiT-S/4 | cached | 8 | fp32 | eager |") == 1


@pytest.mark.slow
def test_captioned_steps_use_the_datas_text_tokens(tiny_config, captioned_data, tmp_path, capsys, monkeypatch):
    """A network that reads text is measured with the data's text tokens, and so is a term with captions as target."""
    given, whole = [], measure.MeasuredStep.backward

    def seen(step, batch, features):
        given.append(step.source.condition(batch))
        whole(step, batch, features)

    monkeypatch.setattr(measure.MeasuredStep, "backward", seen)
    term = {"target": "text", "depth": 1, "pool": True, "projector": "linear"}
    path, data = tmp_path / "text.yaml", str(captioned_data / "stored")
    for changes in (
        {"model": {"backbone": "mmdit", "hidden_dim": 16, "depth": 2, "num_heads": 2}},
        {"alignments": [term]},
    ):
        path.write_text(tiny_config.override(**changes).to_yaml())
        assert run(["bench", str(path), "--rounds", "1", "--precision", "fp32", "--data", data]) == 0
        assert {tuple(condition.text.shape[1:]) for condition in given} == {(4, 8)}
        given.clear()
    term["target"] = "text:width=8"
    path.write_text(tiny_config.override(alignments=[term]).to_yaml())
    assert run(["bench", str(path), "--rounds", "1", "--precision", "fp32"]) == 0
    assert {condition.text.shape[2] for condition in given} == {8}


def test_an_encoder_that_runs_in_the_step_is_named(recipe, image_folder, tmp_path, capsys):
    data = tmp_path / "data"
    assert run(["prepare", str(image_folder), str(data), "--resolution", "16"]) == 0
    words = ["--rounds", "1", "--precision", "fp32", "--out", str(tmp_path / "bench.json")]
    assert run(["bench", str(recipe), "--data", str(data), *words]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| SiT-S/4 | online | 8 |") == 1
    assert "Store the target tokens" in printed
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert rows[0]["utilisation_with_encoder"] > rows[0]["utilisation"] > 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["no-such-recipe"], "'no-such-recipe'"),
        ([], "needs RECIPE"),
        (["quickstart", "--rounds", "0"], "rounds"),
        (["quickstart", "--precision", "int8"], "int8"),
        (["quickstart", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_give_one_line_errors(words, sentence, capsys):
    assert run(["bench", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_compiled_recipe_has_no_second_compiled_row(tiny_config, tmp_path, capsys):
    (tmp_path / "compiled.yaml").write_text(tiny_config.override(compile=True).to_yaml())
    assert run(["bench", str(tmp_path / "compiled.yaml"), "--compiled", "--rounds", "1"]) == 2
    assert "--compiled has no effect" in capsys.readouterr().err


def test_wrong_folders_are_refused_before_measuring(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("repa.performance.profiling.rate", lambda *_: pytest.fail("measured first"))
    assert run(["bench", "quickstart", "--data", str(tmp_path)]) == 2
    assert "holds no prepared data" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(["bench", "quickstart", "--out", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_several_processes_are_refused(recipe, monkeypatch):
    from repa.base import dist

    monkeypatch.setattr(dist, "setup", lambda: torch.device("cpu"))
    monkeypatch.setattr(dist, "active", lambda: True)
    monkeypatch.setattr(dist, "teardown", lambda: None)
    with pytest.raises(UserError, match="without torchrun"):
        bench.main([str(recipe)])


@pytest.mark.parametrize(("best", "measured"), [("fp32", ["fp32"]), ("bf16", ["bf16", "fp32"])])
def test_bf16_is_measured_by_default_only_where_it_is_faster(recipe, tmp_path, monkeypatch, best, measured):
    """On a CPU without bfloat16 instructions a product takes 50 times as long, and the command seems to hang."""
    monkeypatch.setattr("repa.base.device.best_precision", lambda device: best)
    out = tmp_path / "bench.json"
    assert run(["bench", str(recipe), "--rounds", "1", "--token-width", "12", "--out", str(out)]) == 0
    assert sorted(row["precision"] for row in json.loads(out.read_text())["rows"]) == measured
