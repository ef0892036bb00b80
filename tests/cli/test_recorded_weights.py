"""Weight folders given to `prepare` are remembered; when a folder has moved, the error names the flag."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from repa.cli import main
from repa.runs import layout
from tests.autoencoders.folders import save_kl


@pytest.fixture
def refused(capsys):
    def run(*argv):
        assert main.run([str(word) for word in argv]) == 2
        return capsys.readouterr().err

    return run


def run(*argv):
    assert main.run([str(word) for word in argv]) == 0


def test_weight_folders_given_to_prepare_are_remembered(image_folder, tiny_config, tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kl = Path(save_kl(tmp_path / "kl", latent_channels=4))
    tiny = tmp_path / "tiny.safetensors"
    shutil.copy(resources.files("repa.encoders") / "weights" / "tiny.safetensors", tiny)
    prepare = [
        "prepare",
        image_folder,
        "data",
        "--resolution",
        16,
        "--autoencoder",
        "sd-vae-ft-mse",
        "--features",
        "tiny",
    ]
    # a relative path
    run(*prepare, "--autoencoder-weights", "kl", "--feature-weights", "tiny=tiny.safetensors", "--num-workers", 0)
    config = json.loads(Path("data/manifest.json").read_text())["config"]
    assert config["autoencoder_weights"] == str(kl)
    assert config["feature_weights"] == {"tiny": str(tiny)}

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    values = tiny_config.model_dump(mode="json")
    values["model"] = {**values["model"], "name": "SiT-S/2"}
    Path("r.yaml").write_text(yaml.safe_dump({**values, "num_steps": 2, "save_every": 2}))
    run("train", "r.yaml", "--data", "../data", "--out", "run")
    run("sample", "run", "--out", "s.npz", "--num-images", 2, "--steps", 1)
    run("check", "../data", "--full")
    run(
        "evaluate",
        "run",
        "--reference",
        "../data",
        "--features",
        "tiny",
        "--num-images",
        4,
        "--steps",
        1,
        "--metrics",
        "fd",
    )
    run("analyse", "cknna", "run", "--data", "../data", "--encoder", "tiny", "--times", 0.5, "--depths", 1)

    kl.rename(tmp_path / "moved")
    assert "--autoencoder-weights" in refused("sample", "run", "--out", "t.npz", "--num-images", 2, "--steps", 1)
    assert "--autoencoder-weights" in refused("train", "r.yaml", "--data", "../data", "--out", "run2")
    run("sample", "run", "--out", "t.npz", "--num-images", 2, "--steps", 1, "--autoencoder-weights", tmp_path / "moved")
    # the same weights with another scale, as a copy of them from another model has
    other = shutil.copytree(tmp_path / "moved", tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**settings, "scaling_factor": 0.5}))
    for argv in (
        ("sample", "run", "--out", "u.npz", "--num-images", 2),
        ("train", "r.yaml", "--data", "../data", "--out", "x"),
    ):
        said = refused(*argv, "--autoencoder-weights", other)
        assert "have the scale 0.18215, but the loaded sd-vae-ft-mse has 0.5: give the same weights" in said
    save_kl(kl, latent_channels=4, seed=5)  # replace the weights
    assert "--autoencoder-weights" in refused("sample", "run", "--out", "u.npz", "--num-images", 2, "--steps", 1)
    assert "--autoencoder-weights" in refused("train", "r.yaml", "--data", "../data", "--out", "run2")
    assert not (tmp_path / "elsewhere" / "run2" / "checkpoints").exists()
    save_file({name: x + 1 for name, x in load_file(tiny).items()}, tiny)
    said = refused(
        "analyse", "cknna", "run", "--data", "../data", "--encoder", "tiny", "--autoencoder-weights", tmp_path / "moved"
    )
    assert "--feature-weights" in said


def test_weights_of_an_encoder_that_never_runs_are_refused(tiny_config, data_folder, tmp_path, refused):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(tiny_config.override(preview={}).to_yaml())
    train = ["train", recipe, "--data", data_folder, "--out", tmp_path / "run"]
    for name, why in (
        ("tiny", f"whose tokens {data_folder} holds"),
        ("tiny-classifier", "which this run does not compute"),
    ):
        assert f"has no effect for {name}, {why}" in refused(*train, "--feature-weights", f"{name}=w.safetensors")
    assert not (tmp_path / "run").exists()


def test_the_error_about_changed_settings_says_how_to_continue(tiny_config, data_folder, tmp_path, refused):
    recipe, out = tmp_path / "r.yaml", tmp_path / "run"
    recipe.write_text(tiny_config.override(num_steps=2, save_every=2).to_yaml())
    run("train", recipe, "--data", data_folder, "--out", out, "--ema-widths", 0.1)
    said = refused("train", recipe, "--data", data_folder, "--out", out, "--num-steps", 3)  # without --ema-widths
    assert "ema_widths" in said
    assert f"repa train {out} --data {data_folder} --out {out}" in said
    run("train", out, "--data", data_folder, "--out", out, "--num-steps", 3)  # the suggested command works
    assert layout.checkpoint_steps(out) == [2, 3]
