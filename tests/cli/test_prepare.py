"""`repa prepare`, `repa check` and `repa show` on one folder."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from repa.cli import main
from repa.data import open_data

SOURCE = "photographs:num=30"
FIRST = [
    "--resolution",
    "16",
    "--shard-size",
    "8",
    "--features",
    "tiny",
    "--feature-forms",
    "int8",
    "--num-workers",
    "0",
]


@pytest.fixture
def repa(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder; returns its exit code and its output."""
    monkeypatch.chdir(tmp_path)

    def run(*argv):
        code = main.run([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def test_a_folder_is_planned_prepared_extended_and_reduced(repa, tmp_path):
    code, text = repa("prepare", SOURCE, "data", *FIRST, "--plan")
    assert code == 0
    assert "30 images of 20 classes" in text
    assert "features.tiny" in text
    assert "Nothing was written" in text
    assert not (tmp_path / "data").exists()
    code, text = repa("prepare", SOURCE, "data", *FIRST, "--flip")
    assert code == 0
    assert "data: 30 images of 20 classes at 16 pixels, 30 mirrored copies." in text
    assert "60/60 images" in text
    assert "written" in text
    before = open_data("data").manifest
    assert repa("prepare", SOURCE, "data")[0] == 0  # settings that are left out come from the folder
    assert repa("prepare", SOURCE, "data", "--features", "tiny")[0] == 0
    assert repa("prepare", SOURCE, "data", "--feature-forms", "int8")[0] == 0
    assert open_data("data").manifest == before
    assert "feature_forms of tiny: int8 -> fp16" in repa("prepare", SOURCE, "data", "--feature-forms", "fp16")[1]
    code, text = repa("prepare", SOURCE, "data", "--resolution", "32")
    assert code == 2
    assert "resolution: 16 -> 32" in text
    code, text = repa("prepare", "data", "--only", "features:tiny-classifier", "--feature-forms", "pca8")
    assert code == 0
    features = open_data("data").features
    assert {name: facts.form for name, facts in features.items()} == {"tiny": "int8", "tiny-classifier": "pca8"}
    # as in the first command
    assert repa("prepare", SOURCE, "data", "--features", "tiny", "--feature-forms", "int8")[0] == 0
    code, text = repa("show", "data")
    assert "30 of 20 classes at 16 pixels, and a mirrored copy of each" in text
    assert "tiny (4 x 4 x 192 as int8), tiny-classifier (2 x 2 x 128 as pca8)" in text
    code, text = repa("check", "data", "--full", "--num-images", "4")
    assert code == 0
    assert "all checksums match" in text
    assert "features.tiny-classifier     encoded again: relative error" in text
    code, text = repa("prepare", "data", "--remove", "features:tiny")
    assert "features:tiny removed. Left: labels, images, features.tiny-classifier, pooled.tiny-classifier." in text
    assert list(open_data("data").features) == ["tiny-classifier"]


def test_labels_are_chosen_by_an_option(repa, image_folder):
    code, printed = repa(
        "prepare", image_folder, "data", "--resolution", "16", "--labels", "folders", "--num-workers", "0"
    )
    assert code == 0, printed
    assert "labels      from the first folder of each path" in printed


def test_a_part_is_prepared_first_and_then_the_rest(repa):
    code, text = repa("prepare", SOURCE, "data", *FIRST, "--only", "base")
    assert code == 0
    assert "this share is done, others are not" in text
    assert "not finished" in repa("check", "data")[1]
    assert "photographs" in repa("prepare", SOURCE, "data", "--plan")[1]
    assert repa("prepare", SOURCE, "data")[0] == 0
    assert open_data("data").features["tiny"].form == "int8"


def test_check_finds_damage(repa, tmp_path):
    repa("prepare", SOURCE, "data", *FIRST)
    path = tmp_path / "data" / "features.tiny-00001.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert repa("check", "data")[0] == 0  # only sizes are checked
    assert "--num-images has no effect without --full" in repa("check", "data", "--num-images", "4")[1]
    assert repa("check", "data", "--full", "--num-images", "0")[0] == 2
    code, text = repa("check", "data", "--full")
    assert code == 2
    assert "1 of 20 files in data do not match their checksums (features.tiny-00001.npy)" in text
    path.unlink()
    assert "features.tiny-00001.npy is missing" in repa("check", "data")[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["data"], "needs a source and a folder, but got only 'data'"),
        (["data", "--only", "base"], "--only base needs the source"),
        (["data", "--only", "features:tinny"], "Did you mean 'tiny'"),
        ([SOURCE, "data"], "needs --resolution for a new folder"),
        ([SOURCE, "data", "--resolution", "4"], "resolution"),
        (["data", "--remove", "features:tiny"], "holds no prepared data"),
        (
            [SOURCE, "data", "--resolution", "16", "--features", "tiny", "--feature-forms", "int4"],
            "Unknown token format 'int4'",
        ),
        ([SOURCE, "data", "--resolution", "16", "--precision", "fp8"], "'fp32', 'bf16' or 'fp16'"),
        ([SOURCE, "data", "--resolution", "16", "--only", "features:dino-b", "base"], "dino-b"),
    ],
)
def test_invalid_input_is_refused(repa, tmp_path, argv, sentence):
    code, text = repa("prepare", *argv)
    assert code == 2
    assert sentence in text
    assert text.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_take_their_share_from_torchruns_variables(repa, tmp_path):
    """The two processes do not communicate, and the second finishes the folder."""
    for rank in ("1", "0"):
        assert not (tmp_path / "data" / "manifest.json").exists()
        env = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env["PYTHONPATH"] = os.path.join(os.path.dirname(main.__file__), "..", "..")
        done = subprocess.run(
            [sys.executable, "-m", "repa", "prepare", SOURCE, "data", *FIRST], env=env, check=True, capture_output=True
        )
        shards = sorted(path.name for path in (tmp_path / "data").glob("labels*"))
        assert shards == [f"labels-0000{k}.npy" for k in ((1, 3) if rank == "1" else range(4))]
        assert (b"share 1 of 2" in done.stderr) == (rank == "0")
    assert open_data("data").num_images == 30


def test_the_next_command_names_a_recipe_for_the_image_size(repa):
    text = repa("prepare", "photographs:num=2", "data", "--resolution", "64", "--num-workers", "0")[1]
    assert "Next: repa train RECIPE --data data --out RUN   (for 64 pixels own-images-64;" in text
    text = repa("prepare", "photographs:num=2", "other", "--resolution", "32", "--num-workers", "0")[1]
    assert "(for 32 pixels quickstart, quickstart-repa, cifar10, cifar10-repa;" in text


def test_a_column_that_may_be_the_labels_is_announced(repa, tmp_path):
    (tmp_path / "birds").mkdir()
    for index in range(2):
        Image.new("RGB", (16, 16)).save(tmp_path / "birds" / f"{index}.png")
    (tmp_path / "birds" / "metadata.csv").write_text("file_name,species\n0.png,wren\n1.png,robin\n")
    words = ("--resolution", 16, "--num-workers", 0)
    assert (
        "to use a column as labels, prepare a new folder with --labels metadata.csv:COLUMN"
        in (repa("prepare", "birds", "one", *words)[1])
    )
    code, text = repa("prepare", "birds", "two", *words, "--labels", "metadata.csv:species")
    assert (code, "2 images of 2 classes" in text, "as labels" in text) == (0, True, False)
