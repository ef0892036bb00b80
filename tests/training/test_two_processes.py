"""Two gloo processes give the same losses, weights, samples and shards as one, and an error ends both.

Each torchrun takes seconds, so there are only five: train, sample, evaluate (slow), prepare, and an error.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from repa.alignment.config import AlignmentConfig
from repa.cli.main import run
from repa.runs import layout, read_metrics
from tests.training.processes import torchrun


def repa_twice(*argv: object, check: bool = True) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc-per-node 2 -m repa ...`; fails after two minutes."""
    done = torchrun("-m", "repa", *argv, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def alone(*argv) -> None:
    assert run([str(word) for word in argv]) == 0


def rows(folder: Path, kind: str) -> list[dict]:
    return [row for row in read_metrics(folder) if row["kind"] == kind]


def weights(folder: Path, step: int) -> dict[str, np.ndarray]:
    names = (layout.MODEL_FILE, layout.EMA_FILE, layout.PROJECTORS_FILE)
    files = {name: load_file(layout.checkpoint_folder(folder, step) / name) for name in names}
    return {f"{name}/{key}": value for name, tensors in files.items() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def recipe(tiny_config, tmp_path_factory) -> Path:
    """Several losses, of which nt_xent, dispersive, gram and the contrastive term compare images of both processes."""
    alignments = (
        tiny_config.alignments[0],
        AlignmentConfig(target="tiny", depth=2, projector="linear", loss="nt_xent:temperature=0.2"),
        AlignmentConfig(target="none", depth=2, projector="none", loss="dispersive:temperature=0.5", weight=0.2),
        AlignmentConfig(target="block:depth=2", depth=1, projector="none", loss="gram:scope=batch", weight=0.2),
        AlignmentConfig(target="ema:depth=2,earlier=0.2", depth=1, projector="mlp2", loss="smooth_l1", weight=0.2),
    )
    preview = {"every": 6, "num_images": 5, "num_scored": 21, "num_steps": 3}  # odd numbers, so that shares are unequal
    path = tmp_path_factory.mktemp("recipe") / "two.yaml"
    path.write_text(
        tiny_config.override(
            alignments=alignments,
            preview=preview,
            optimizer={"learning_rate": 1e-3},
            diffusion={"contrastive": 0.1, "velocity_cosine": 0.5},
        ).to_yaml()
    )
    return path


@pytest.fixture(scope="module")
def runs(recipe, data_folder, tmp_path_factory) -> tuple[Path, Path]:
    """(one, two): ten steps by one process; six by two processes, then four more by one."""
    one, two = (tmp_path_factory.mktemp("two") / name for name in ("one", "two"))
    alone("train", recipe, "--data", data_folder, "--out", one, "--save-every", 6, "--keep-checkpoints", 0)
    repa_twice("train", recipe, "--data", data_folder, "--out", two, "--num-steps", 6, "--keep-checkpoints", 0)
    alone("train", recipe, "--data", data_folder, "--out", two, "--save-every", 6, "--keep-checkpoints", 0)
    return one, two


def test_the_losses_equal_those_of_one_process(runs):
    one, two = (rows(folder, "train") for folder in runs)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 11))
    for mine, yours in zip(one, two, strict=True):
        assert mine["alignment"].keys() == {
            "tiny@1",
            "tiny@2",
            "none@2",
            "block:depth=2@1",
            "ema:depth=2,earlier=0.2@1",
        }
        for name in ("loss", "denoising"):
            assert mine[name] == pytest.approx(yours[name], abs=1e-5), (mine["step"], name)
        for name, value in mine["alignment"].items():
            assert value == pytest.approx(yours["alignment"][name], abs=1e-5), (mine["step"], name)
        assert mine["grad_norm"] == pytest.approx(yours["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("step", [6, 10])  # saved by two processes; saved by one that resumed
def test_the_weights_are_close_to_those_of_one_process(step, runs):
    one, two = (weights(folder, step) for folder in runs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-5, err_msg=name)


def test_the_log_records_the_number_of_processes(runs):
    _, two = runs
    begins = [line for line in (two / layout.LOG).read_text().splitlines() if line.startswith("from step")]
    assert [line.split(",")[0] for line in begins] == ["from step 0 on 2 x cpu", "from step 6 on 1 x cpu"]


def test_previews_and_distances_equal_those_of_one_process(runs):
    one, two = runs
    images = []
    for folder in runs:
        with np.load(layout.preview(folder, 6, ".npz"), allow_pickle=False) as archive:
            images.append(archive["arr_0"].astype(int))
    assert images[0].shape == (5, 16, 16, 3)
    assert np.abs(images[0] - images[1]).max() <= 1  # the weights differ in the sixth digit
    mine, yours = (rows(folder, "eval")[0] for folder in (one, two))
    assert mine["num_samples"] == yours["num_samples"] == 21
    assert mine["frechet_distance"] == pytest.approx(yours["frechet_distance"], rel=1e-3)


def test_samples_equal_those_of_one_process(random_run, tmp_path):
    command = (
        "sample",
        random_run,
        "--num-images",
        11,
        "--batch-size",
        4,
        "--steps",
        4,
        "--guidance",
        "cfg:scale=1.5",
        "--out",
    )
    alone(*command, tmp_path / "one.npz")
    done = repa_twice(*command, tmp_path / "two.npz")
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{n}.{s}" for n in ("one", "two") for s in ("json", "npz", "png")
    ]
    assert done.stdout.count("11 images of step 20") == 1  # only one process prints


# tests/evaluation/test_two_processes.py has the fast form, without torchrun
@pytest.mark.slow
def test_evaluation_equals_that_of_one_process(random_run, data_folder, tmp_path):
    """For a run sampled while it is measured, with a reference computed by both."""
    command = ("evaluate", random_run, "--num-images", 11, "--steps", 2, "--batch-size", 3, "--reference", data_folder,
               "--features", "tiny-classifier", "--out")  # fmt: skip
    results = []
    for launch in (repa_twice, alone):
        shutil.rmtree(data_folder / "reference", ignore_errors=True)  # computed again by each
        out = tmp_path / f"{launch.__name__}.json"
        launch(*command, out)
        results.append(json.loads(out.read_text()))
    two, one = results
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["metrics"].keys() == {"fd", "precision", "recall"}
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-6)


def test_shards_equal_those_of_one_process(image_folder, tmp_path):
    command = ("prepare", image_folder)
    settings = ("--resolution", 16, "--features", "tiny", "--shard-size", 9, "--batch-size", 5)
    alone(*command, tmp_path / "one", *settings)
    repa_twice(*command, tmp_path / "two", *settings)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*")} for name in ("one", "two"))
    assert len(one) >= 15
    assert one == two


def test_an_error_in_only_the_main_process_ends_both(random_run, tiny_config, data_folder, tmp_path):
    """The other process is waiting at a barrier."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(tiny_config.to_yaml())
    begin = time.monotonic()
    done = repa_twice(
        "train", recipe, "--data", data_folder, "--out", random_run, "--seed", 7, "--num-steps", 99, check=False
    )
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    assert "repa: " in done.stderr
    assert "holds a run with another configuration (seed: 0 -> 7)" in done.stderr
    assert layout.checkpoint_steps(random_run) == [10, 20]
