"""All commands in sequence: images -> data -> two runs -> samples -> distances -> report; and interrupting them."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import repa
from repa.autoencoders import load_autoencoder
from repa.base.dist import own_device
from repa.base.rng import SampleStreams
from repa.cli import options
from repa.cli.main import run
from repa.cli.sample import SampleArguments
from repa.runs import layout, read_metrics
from repa.training import TrainConfig

WITHOUT_PREVIEWS = shlex.split(
    "--model.hidden-dim 32 --model.depth 2 --model.num-heads 2 --alignments.0.depth 1 --alignments.0.projector mlp:width=16 "
    "--batch-size 8 --num-steps 6 --log-every 1 --save-every 3 --precision fp32"
)
SMALL = WITHOUT_PREVIEWS + shlex.split(
    "--preview.every 3 --preview.num-images 4 --preview.num-scored 20 --preview.num-steps 3"
)


def repa_run(*argv) -> None:
    assert run([str(word) for word in argv]) == 0


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def house(image_folder, tmp_path_factory) -> Path:
    """A folder in which the commands made data/, baseline/ and aligned/."""
    root = tmp_path_factory.mktemp("house")
    repa_run("prepare", image_folder, root / "data", "--resolution", 16, "--features", "tiny")
    for name, recipe in (("baseline", "quickstart"), ("aligned", "quickstart-repa")):
        repa_run("train", recipe, "--data", root / "data", "--out", root / name, *SMALL)
    return root


def test_a_zip_gives_the_same_data_as_its_folder(house, image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(image_folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(image_folder))
    command = ("prepare", tmp_path / "images.zip", tmp_path / "data", "--resolution", 16, "--features", "tiny")
    repa_run(*command)
    assert arrays(tmp_path / "data") == arrays(house / "data")
    assert len(arrays(house / "data")) >= 3
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    repa_run(*command)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}


@pytest.mark.parametrize(("name", "aligned"), [("baseline", False), ("aligned", True)])
def test_a_run_folder_has_the_documented_files(name, aligned, house):
    folder = house / name
    config = TrainConfig.load(folder / layout.CONFIG)
    assert (config.model.latent_size, config.model.num_classes, config.batch_size) == (16, 2, 8)
    assert config.alignments[0].measure_only != aligned
    assert json.loads((folder / layout.DATA).read_text())["class_names"] == ["dark", "light"]
    rows = [row for row in read_metrics(folder) if row["kind"] != "event"]
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 1), ("train", 2), ("train", 3), ("eval", 3), ("train", 4), ("train", 5), ("train", 6), ("eval", 6),
    ]  # fmt: skip
    for row in rows:
        if row["kind"] == "eval":
            assert row["frechet_distance"] > 0
            assert (row["features"], row["num_samples"], row["nfe"]) == ("tiny-classifier", 20, 5)
    assert layout.checkpoint_steps(folder) == [3, 6]
    assert layout.preview_steps(folder) == [3, 6]
    with np.load(layout.preview(folder, 6, ".npz"), allow_pickle=False) as archive:
        assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.uint8, (4, 16, 16, 3))
    assert Image.open(layout.preview(folder, 6, ".png")).size == (34, 34)


def test_training_a_finished_run_changes_nothing(house, capsys):
    before = {path: path.read_bytes() for path in (house / "aligned").rglob("*") if path.is_file()}
    repa_run("train", "quickstart-repa", "--data", house / "data", "--out", house / "aligned", *SMALL)
    assert "is complete: it has 6 steps, and 6 are asked for" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (house / "aligned").rglob("*") if path.is_file()}


def test_previews_start_from_the_same_noise(house, tmp_path):
    """An untrained network predicts 0, so its previews are the noise, which depends only on (seed, index)."""
    repa_run("train", "quickstart-repa", "--data", house / "data", "--out", tmp_path / "r", *SMALL, "--seed", 5,
             "--num-steps", 1, "--optimizer.learning-rate", 1e-12, "--diffusion.prediction", "velocity")  # fmt: skip
    with np.load(layout.preview(tmp_path / "r", 1, ".npz"), allow_pickle=False) as archive:
        preview = archive["arr_0"]
    wanted = load_autoencoder("pixels").decode(SampleStreams(5, range(4)).randn(3, 16, 16)).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(preview, wanted)


def test_samples_are_evaluated_and_reported(house, tmp_path, capsys):
    for name in ("baseline", "aligned"):
        out, results = tmp_path / f"{name}.npz", tmp_path / f"{name}-results.json"
        repa_run(
            "sample",
            house / name,
            "--num-images",
            10,
            "--steps",
            3,
            "--guidance",
            "cfg:scale=1.5",
            "--out",
            out,
            "--batch-size",
            4,
        )
        with np.load(out, allow_pickle=False) as archive:
            assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.uint8, (10, 16, 16, 3))
        assert out.with_suffix(".png").is_file()
        repa_run("evaluate", out, "--reference", house / "data", "--features", "tiny-classifier",
                 "--metrics", "fd", "kd", "precision", "recall",
                 "--out", results)  # fmt: skip
        found = json.loads(results.read_text())
        assert found["metrics"].keys() == {"fd", "kd", "precision", "recall"}
        assert found["metrics"]["fd"] > 0
        assert (found["num_samples"], found["num_reference"]) == (10, 40)
    assert "10 samples against 40 images" in capsys.readouterr().out
    page = tmp_path / "report.html"
    repa_run("report", house / "baseline", house / "aligned", "--names", "plain one", "aligned one", "--out", page)
    text = page.read_text()
    assert "plain one" in text
    assert "aligned one" in text
    assert text.count("data:image/png;base64,") >= 4  # previews of both, at two steps
    assert "http://" not in text.replace("http://www.w3.org", "")  # self-contained: only XML namespaces remain


def test_samples_of_raw_weights_and_older_steps_differ(house, tmp_path):
    def images(*extra):
        (tmp_path / "s.npz").unlink(missing_ok=True)
        repa_run("sample", house / "aligned", "--num-images", 4, "--steps", 3, "--out", tmp_path / "s.npz", *extra)
        with np.load(tmp_path / "s.npz", allow_pickle=False) as archive:
            return archive["arr_0"]

    newest = images()
    assert np.array_equal(images(), newest)
    assert np.array_equal(images("--checkpoint", 6, "--weights", "ema"), newest)
    assert not np.array_equal(images("--checkpoint", 3), newest)
    assert not np.array_equal(images("--weights", "model"), newest)


def test_show_describes_a_recipe_data_and_a_run(house, capsys):
    repa_run("show", "quickstart")
    config = TrainConfig.parse(yaml.safe_load(capsys.readouterr().out))
    assert config.alignments[0].measure_only
    repa_run("show", house / "data")
    text = capsys.readouterr().out
    assert "40 of 2 classes at 16 pixels" in text
    assert "tiny (4 x 4 x" in text
    repa_run("show", house / "aligned")
    text = capsys.readouterr().out
    assert "6 steps logged, checkpoints 3, 6" in text
    assert "hidden_dim: 32" in text


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("recipes", "sit-xl2-repa"), ("models", "SiT-XL/2"), ("encoders", "dinov2-b"), ("autoencoders", "pixels"),
        ("paths", "trigonometric"), ("times", "logit_normal"), ("samplers", "heun"), ("guidances", "internal"), ("losses", "nt_xent"),
        ("projectors", "conv"), ("schedules", "cosine"), ("", "samplers"),
    ],
)  # fmt: skip
def test_list_prints_the_names_of_every_kind(kind, name, capsys):
    repa_run("list", *filter(None, [kind]))
    assert name in [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow)]
)
def test_a_stopped_training_saves_and_the_same_command_finishes_it(number, code, house, tmp_path, capsys):
    run_folder = tmp_path / "r"
    argv = ["train", "quickstart-repa", "--data", str(house / "data"), "--out", str(run_folder), *WITHOUT_PREVIEWS]
    argv += ["--preview.every", "0", "--num-steps", "150", "--save-every", "1000"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(repa.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-m", "repa", *argv], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        limit = time.monotonic() + 60
        while sum(row["kind"] == "train" for row in read_metrics(run_folder)) < 3:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    (step,) = layout.checkpoint_steps(run_folder)
    assert 3 <= step < 150
    again = shlex.join(["repa", *argv])
    assert (
        f"Stopped by {number.name} after step {step} with a checkpoint in {run_folder}. To continue: {again}\n" in out
    )
    assert "Traceback" not in err
    assert [row["step"] for row in read_metrics(run_folder) if row["kind"] == "train"] == list(range(1, step + 1))
    repa_run(*shlex.split(again)[1:])
    said = capsys.readouterr().out
    assert "150 steps done" in said
    # The paper's 250 network calls per image take too long on a CPU.
    _, _, *words = shlex.split(said.partition("Next: ")[2])
    sampling = options.parse(SampleArguments, words)
    expected = ("heun", 25) if own_device().type == "cpu" else ("euler_maruyama", 250)
    assert (sampling.run, sampling.sampler, sampling.steps) == (str(run_folder), *expected)
    assert [row["step"] for row in read_metrics(run_folder) if row["kind"] == "train"] == list(range(1, 151))
