"""`repa sample` with --compile, and with PNG files as output."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from repa.cli.main import run


@pytest.mark.slow
def test_compiled_samples_are_equal_up_to_rounding(random_run, tmp_path):
    """11 images in batches of 4, guided inside an interval: the network sees batches of 8, 6, 4 and 3 rows."""
    settings = ("--num-images", "11", "--batch-size", "4", "--steps", "6", "--guidance", "cfg:scale=2,low=0.2,high=0.7")
    settings += ("--precision", "fp32")
    images = []
    for name, more in (("eager", ()), ("compiled", ("--compile",))):
        torch._dynamo.reset()
        assert run(["sample", str(random_run), "--out", str(tmp_path / f"{name}.npz"), *settings, *more]) == 0
        images.append(np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int))
    assert images[0].std() > 10
    assert np.abs(images[0] - images[1]).max() <= 1
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_a_folder_of_pngs_has_the_same_images_as_the_npz(random_run, tmp_path, capsys):
    settings = ("--num-images", "5", "--batch-size", "2", "--steps", "3", "--sampler", "euler")
    assert run(["sample", str(random_run), "--out", str(tmp_path / "one.npz"), *settings]) == 0
    folder = tmp_path / "pictures"
    folder.mkdir()  # an empty folder is accepted
    assert run(["sample", str(random_run), "--out", f"{folder}/", *settings]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [f"{index:06d}.png" for index in range(5)]
    for image, path in zip(np.load(tmp_path / "one.npz")["arr_0"], sorted(folder.iterdir()), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), image)
    assert json.loads((tmp_path / "pictures.json").read_text())["num"] == 5
    assert Image.open(tmp_path / "pictures.png").size != (16, 16)
    # The same command does nothing; another job, and a folder with other files, are refused.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run(["sample", str(random_run), "--out", str(folder), *settings]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    for out in (folder, tmp_path / "pictures.npz"):
        assert run(["sample", str(random_run), "--out", str(out), *settings, "--seed", "9"]) == 2
        assert "seed: 0 -> 9" in capsys.readouterr().err
    assert run(["sample", str(random_run), "--out", str(tmp_path), *settings]) == 2
    assert f"{tmp_path} exists" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_folder_of_pngs_can_be_evaluated_by_the_printed_command(random_run, data_folder, tmp_path, capsys):
    settings = ("--num-images", "8", "--steps", "2", "--sampler", "euler")
    reference = ("--features", "tiny-classifier", "--metrics", "fd")
    found = []
    for name in ("s.npz", "s2"):
        assert run(["sample", str(random_run), "--out", str(tmp_path / name), *settings]) == 0
        command = (
            capsys.readouterr().out.partition("Next: repa ")[2].partition(",")[0].replace("DATA", str(data_folder))
        )
        assert run([*command.split(), *reference, "--out", str(tmp_path / f"{name}-fd.json")]) == 0
        found.append(json.loads((tmp_path / f"{name}-fd.json").read_text())["metrics"]["fd"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_the_command_that_training_prints_samples_a_run_on_captions(captioned_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ("--model.hidden-dim", "32", "--model.depth", "2", "--model.num-heads", "2", "--batch-size", "4")
    small += ("--preview.every", "0", "--text", "tiny-text:tokens=4,width=8", "--alignments.0.target", "tiny")
    assert (
        run(
            [
                "train",
                "quickstart-text",
                "--data",
                str(captioned_data / "stored"),
                "--out",
                "a run",
                "--num-steps",
                "1",
                *small,
            ]
        )
        == 0
    )
    command = capsys.readouterr().out.partition("Next: repa ")[2]
    assert run([*shlex.split(command), "--num-images", "2", "--steps", "1"]) == 0


def test_a_refused_setting_leaves_no_parts(random_run, tmp_path, capsys):
    command = ["sample", str(random_run), "--num-images", "2", "--steps", "1", "--out", str(tmp_path / "s.npz")]
    assert run([*command, "--sampler", "euler_maruyama:last=-1"]) == 2
    assert "last=-1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(command) == 0
