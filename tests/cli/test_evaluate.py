"""The command `repa evaluate`: files, runs, references and errors."""

import json
import shutil

import numpy as np
import pytest

from repa.base import files
from repa.cli import main
from repa.report.runs import evaluation_row, protocol_of
from repa.runs import layout

FEATURES = ("--features", "tiny-classifier")
SAMPLING = ("--num-images", "10", "--steps", "2", "--labels", "balanced", "--batch-size", "4", "--seed", "3")


def repa(*words):
    return main.run([str(word) for word in words])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path / "cache"))


def test_measuring_a_run_equals_sampling_it_first(random_run, data_folder, tmp_path, capsys):
    """Both ways give the same figures and the same record of how the samples were made."""
    metrics = ("--metrics", "fd", "kd", "precision", "recall")
    arguments = ("--reference", data_folder, *FEATURES, *metrics, "--batch-size", 4)
    assert repa("evaluate", random_run, *SAMPLING, *arguments, "--out", tmp_path / "direct.json") == 0
    assert "10 samples against 40 images" in capsys.readouterr().out
    assert repa("sample", random_run, *SAMPLING, "--out", tmp_path / "s.npz") == 0
    assert repa("evaluate", tmp_path / "s.npz", *arguments, "--out", tmp_path / "file.json") == 0
    np.savez(tmp_path / "s.npz", arr_0=255 - np.load(tmp_path / "s.npz")["arr_0"])  # beside the record of others
    assert repa("evaluate", tmp_path / "s.npz", *arguments, "--out", tmp_path / "other.json") == 0
    assert json.loads((tmp_path / "other.json").read_text())["made"] is None
    direct, file = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("direct", "file"))
    assert direct["metrics"] == pytest.approx(file["metrics"])
    for made in (direct["made"], file["made"]):
        for key, value in {"step": 20, "weights": "ema", "sampler": "euler_maruyama", "steps": 2, "labels": "balanced",
                           "seed": 3, "num": 10}.items():  # fmt: skip
            assert made[key] == value
        assert made["guidance"] == []
        assert made["time"].startswith("t = 0 is data, t = 1 is noise")
    ema = layout.checkpoint_folder(random_run, 20) / layout.EMA_FILE
    assert direct["made"]["weights_sha256"] == file["made"]["weights_sha256"] == files.sha256(ema)
    assert direct["made"]["nfe"] == file["made"]["nfe"] >= 2
    protocols = [protocol_of(evaluation_row(tmp_path / f"{name}.json")) for name in ("direct", "file")]
    assert protocols[0] == protocols[1]  # as the report compares them
    assert direct["encoder"]["name"] == "tiny-classifier"
    assert direct["arithmetic"]["neighbours"] == "float32"
    assert any("fewer than the 128 dimensions" in warning for warning in direct["warnings"])


def test_the_distance_of_real_images_is_printed(random_run, data_folder, tmp_path, capsys):
    said = {}
    for num in (4, 10):
        sampling = ("--num-images", num, "--steps", 2, "--sampler", "euler")
        arguments = ("--reference", data_folder, *FEATURES, "--metrics", "fd", "--out", tmp_path / f"{num}.json")
        assert repa("evaluate", random_run, *sampling, *arguments) == 0
        said[num] = capsys.readouterr().out
    real = json.loads((tmp_path / "4.json").read_text())["distance_of_real"]
    assert real > 0
    assert f"4 random images of the reference itself have fd {real:.4f}" in said[4]
    # more samples than a quarter of the reference
    assert json.loads((tmp_path / "10.json").read_text())["distance_of_real"] is None
    assert "of the reference itself" not in said[10]


def test_results_of_a_run_are_stored_in_its_folder(random_run, data_folder, tmp_path, capsys):
    run = shutil.copytree(random_run, tmp_path / "run")
    for _ in range(2):
        assert repa("evaluate", run, *SAMPLING, "--reference", data_folder, *FEATURES, "--metrics", "fd") == 0
    assert repa("evaluate", run, *SAMPLING, "--reference", data_folder, *FEATURES, "--checkpoint", 10) == 0
    first, second = sorted((run / layout.EVALUATIONS).iterdir())  # an equal measurement replaced its file
    assert first.name.startswith("0000010-ema-")
    assert json.loads(second.read_text())["made"]["step"] == 20
    second.write_text(second.read_text().replace('"num_reference": 40', '"num_reference": 41'))
    capsys.readouterr()
    assert repa("report", run) == 2
    assert f"{second.name} does not match its checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--num-images", 9, "--out", "file/r.json"),
            "r.json cannot be written: a part of this path is a file, not a folder. Choose another path.",
        ),
        (("--num-images", 9, "--out", "folder.json"), "folder.json cannot be written: it is a folder"),
        (("--num-images", 3), "need more than 3 images, but "),
    ],
)
def test_invalid_requests_are_refused_before_sampling(
    words, sentence, random_run, data_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr("repa.sampling.generate", lambda *_: pytest.fail("sampled"))
    monkeypatch.setattr("repa.evaluation.jobs.load_extractor", lambda *_, **__: pytest.fail("looked"))
    assert repa("evaluate", random_run, "--reference", data_folder, *FEATURES, *words) == 2
    assert sentence in capsys.readouterr().err


def test_a_reference_with_too_few_images_is_refused_before_sampling(data_folder, tmp_path, capsys, monkeypatch):
    for name, num in (("s", 5), ("r", 3)):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros((num, 16, 16, 3), np.uint8))
    monkeypatch.setattr("repa.evaluation.jobs.load_extractor", lambda *_, **__: pytest.fail("looked"))
    assert repa("evaluate", tmp_path / "s.npz", "--reference", tmp_path / "r.npz", *FEATURES) == 2
    assert "r.npz has 3: give more" in capsys.readouterr().err


def test_a_reference_file_or_an_image_folder_replaces_its_data(data_folder, image_folder, tmp_path, capsys):
    reference, leftover = tmp_path / "ref.npz", tmp_path / ".ref.npz.abcd1234.tmp"
    leftover.touch()  # of a killed command
    assert repa("evaluate", "reference", data_folder, "--out", reference, *FEATURES) == 0
    assert not leftover.exists()
    assert "statistics of 40 images in the features of tiny-classifier" in capsys.readouterr().out
    np.savez(tmp_path / "s.npz", arr_0=np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))
    for number, against in enumerate((data_folder, reference, image_folder)):
        words = ("--reference", against, *FEATURES, "--out", tmp_path / f"{number}.json")
        assert repa("evaluate", tmp_path / "s.npz", *words) == 0
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"])
    # the data were cropped from that folder to 16 pixels
    assert found[0]["metrics"] == pytest.approx(found[2]["metrics"])
    assert [row["reference_kind"] for row in found] == ["images", "statistics", "images"]
    assert found[0]["made"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("RUN", "--reference", "DATA", *FEATURES), "is a run folder: give the number of samples to generate"),
        (("S", "--reference", "DATA", *FEATURES, "--autoencoder-weights", "w"), "--autoencoder-weights has no effect here"),
        (("S", "--reference", "DATA", *FEATURES, "--steps", "3"), "--steps has no effect here"),
        (("S", "--reference", "DATA", *FEATURES, "--guidance", "cfg:scale=2"), "--guidance has no effect here"),
        (("S", "--reference", "DATA", *FEATURES, "--out", "r.txt"), "--out is r.txt, which does not end in .json"),
        (("S", "--reference", "DATA", *FEATURES, "--out", "S.json"), "is the record of `repa sample` for"),
        (("S", "--reference", "DATA", *FEATURES, "--metrics", "fid"), "'fid' is not measured in the features of tiny-classifier"),
        (("S", "--reference", "RUN", *FEATURES), "is a run folder: give its training data"),
        (("S", "--reference", "none.npz", *FEATURES), "There is no source 'none.npz'"),
        (("S", "--reference", "DATA", "--features", "incepton"), "inception"),
        (("S", "--reference", "DATA", "--features-weights", "no.pth"), "There is no file no.pth with Inception's weights"),
        (("S", "--reference", "DATA"), "weights of Inception-v3 are not on this machine"),
        (("reference", "DATA", "--out", "ref.txt"), "A reference is written as one .npz file"),
        (("reference", "DATA", "--out", "ref.npz", "--resolution", "8"), "of 16 pixels, which are not resized to 8"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused(words, sentence, random_run, data_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("repa.metrics.inception.URL", (tmp_path / "offline").as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    np.savez(tmp_path / "S.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    names = {"RUN": random_run, "DATA": data_folder, "S": tmp_path / "S.npz", "S.json": tmp_path / "S.json"}
    assert repa("evaluate", *(names.get(word, word) for word in words)) == 2
    assert sentence in capsys.readouterr().err
