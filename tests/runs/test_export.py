"""`repa export`: the exported network computes the same as the run, and the model card is correct."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import yaml

from repa.base.files import read_json, read_object, write_sealed
from repa.cli.main import run as repa
from repa.models import build_model, load_exported
from repa.models.diffusers_export import exact_times
from repa.runs import layout, load_checkpoint, load_run
from tests.calls import call
from tests.oracles import released


def inputs(t=(0.1, 0.9)):
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(t), torch.tensor([0, 2])


def export(run, out, *options):
    assert repa(["export", str(run), str(out), *options]) == 0
    return (out / "README.md").read_text()


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    torch.save(released.random_state(learn_sigma=True), folder / "dit.pt")
    command = ["convert", str(folder / "dit.pt"), str(folder / "run"), "--kind", "dit", "--model.num-heads", "2"]
    assert repa([*command, "--autoencoder", "pixels"]) == 0
    return folder / "run"


@pytest.mark.parametrize("step", [10, 20])
def test_an_export_contains_weights_and_configuration(step, random_run, tmp_path):
    text = export(random_run, tmp_path / "out", *(["--checkpoint", "10"] if step == 10 else []))
    wanted = call(load_run(random_run, step=step).model, *inputs()).prediction
    assert wanted.abs().max() > 0
    assert torch.equal(call(load_exported(tmp_path / "out"), *inputs()).prediction, wanted)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["step"], config["autoencoder"], config["class_names"]) == (step, "pixels", ["dark", "light"])
    assert str(random_run) not in json.dumps(config) + text  # no paths of this machine


def test_the_model_card_states_the_facts(random_run, tmp_path):
    text = export(random_run, tmp_path / "out")
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "repa", "tags": ["image-generation", "diffusion-transformer", "repa"]}
    for fact in ("SiT/4, 20 steps", "width 32, depth 2, 2 heads", "40 images of 2 classes", "tiny at block 1, weight 0.5",
                 "velocity on the path linear", "0 is data and 1 is noise", "0 to 1, 2 ",
                 "`class_names` in config.json"):  # fmt: skip
        assert fact in text, fact


def test_the_model_card_does_not_count_flipped_copies(random_run, tmp_path):
    run = shutil.copytree(random_run, tmp_path / "run")
    write_sealed(run / layout.DATA, {**read_object(run / layout.DATA), "num_images": 80})
    assert "40 images of 2 classes" in export(run, tmp_path / "out")


def test_the_model_card_of_a_converted_run_states_its_source(ddpm_run, tmp_path):
    text = export(ddpm_run, tmp_path / "out")
    for fact in (
        "DiT/4, 0 steps",
        "converted from dit.pt",
        "improved DDPM",
        "integer timesteps 0 (nearly data) to 999",
    ):
        assert fact in text, fact


def run_card(text, folder, t):
    """Run the code of a model card."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    x_t, t, labels = inputs(t)
    names = {"x_t": x_t, "t": t, "labels": labels}
    with torch.no_grad():
        exec(code.replace("FOLDER", str(folder)), names)
    return names["prediction"]


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
@pytest.mark.parametrize("kind", ["flow", "ddpm"])
def test_the_code_in_the_model_card_gives_the_runs_outputs(form, kind, random_run, ddpm_run, tmp_path):
    run, t = (random_run, (0.1, 0.9)) if kind == "flow" else (ddpm_run, (5.0, 950.0))
    text = export(run, tmp_path / "out", "--format", form)
    wanted = call(load_run(run).model, *inputs(t)).prediction
    found = run_card(text, tmp_path / "out", t)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert f"library_name: {'repa' if form == 'safetensors' else 'diffusers'}" in text


def test_an_export_becomes_a_run_again(random_run, ddpm_run, tmp_path, capsys):
    for name, run in (("flow", random_run), ("ddpm", ddpm_run)):
        export(run, tmp_path / name)
        again = tmp_path / f"{name}-run"
        assert repa(["convert", str(tmp_path / name), str(again)]) == 0
        for folder, out in ((run, f"{name}-before.npz"), (again, f"{name}-after.npz")):
            command = ["sample", str(folder), "--num-images", "4", "--steps", "3", "--sampler", "euler"]
            assert repa([*command, "--out", str(tmp_path / out)]) == 0
        with np.load(tmp_path / f"{name}-before.npz") as before, np.load(tmp_path / f"{name}-after.npz") as after:
            assert np.array_equal(before["arr_0"], after["arr_0"])
    assert layout.checkpoint_steps(tmp_path / "flow-run") == [20]
    assert repa(["convert", str(tmp_path / "flow"), str(tmp_path / "new"), "--kind", "sit"]) == 2
    assert "kind" in capsys.readouterr().err


def test_a_network_with_overlapping_patches_is_exported(tiny_config, data_folder, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    config = tiny_config.override(model=tiny_config.model.override(patch_overlap=2), num_steps=2)
    (tmp_path / "recipe.yaml").write_text(config.to_yaml())
    assert repa(["train", str(tmp_path / "recipe.yaml"), "--data", str(data_folder), "--out", str(run)]) == 0
    export(run, out)
    assert repa(["convert", str(out), str(tmp_path / "again")]) == 0
    wanted, found = (call(load_run(folder).model, *inputs()).prediction for folder in (run, tmp_path / "again"))
    assert wanted.abs().max() > 0
    assert torch.equal(found, wanted)
    assert repa(["export", str(run), str(tmp_path / "other"), "--format", "diffusers"]) == 2
    assert "has no overlapping patches" in capsys.readouterr().err


def test_invalid_input_is_refused(random_run, tmp_path, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    bare = shutil.copytree(random_run, tmp_path / "bare")
    shutil.rmtree(bare / layout.CHECKPOINTS)
    for command, sentence in [
        (["export", str(random_run), str(tmp_path / "used")], "exists and is not empty"),
        (["export", str(random_run), str(tmp_path / "o"), "--checkpoint", "15"], "no checkpoint of step 15"),
        (["export", str(random_run), str(tmp_path / "o"), "--format", "onnx"], "'safetensors' or 'diffusers'"),
        (["export", str(random_run), str(tmp_path / "o.safetensors")], "give a name without .safetensors"),
        (["export", str(bare), str(tmp_path / "o")], "no checkpoint yet"),
        (["export", str(tmp_path / "absent"), str(tmp_path / "o")], "is not a run folder"),
    ]:
        assert repa(command) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


def test_a_diffusers_export_becomes_a_run_again(random_run, ddpm_run, tmp_path, capsys):
    for name, run, t in (("flow", random_run, (0.1, 0.9)), ("ddpm", ddpm_run, (5.0, 950.0))):
        export(run, tmp_path / name, "--format", "diffusers")
        assert repa(["convert", str(tmp_path / name), str(tmp_path / f"{name}-run")]) == 0, capsys.readouterr().err
        before, after = load_run(run), load_run(tmp_path / f"{name}-run")
        assert (after.step, after.diffusion) == (before.step, before.diffusion)
        found, wanted = (call(loaded.model, *inputs(t)).prediction for loaded in (after, before))
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("eps", "is_old"), [(1e-6, False), (1e-5, True)])
def test_a_dit_saved_by_diffusers_becomes_a_run(eps, is_old, tmp_path, capsys):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=3, norm_eps=eps,
    )  # fmt: skip
    first, second = (block.norm1.emb for block in theirs.transformer_blocks)
    second.load_state_dict(first.state_dict())  # non-zero weights, as after training
    theirs.eval().save_pretrained(tmp_path / "theirs", safe_serialization=not is_old)
    if is_old:  # as diffusers wrote it before it had this class
        path = tmp_path / "theirs" / "config.json"
        old = {**json.loads(path.read_text()), "_class_name": "Transformer2DModel"}
        path.write_text(json.dumps({name: value for name, value in old.items() if name != "norm_eps"}))
    command = ["convert", str(tmp_path / "theirs"), str(tmp_path / "run"), "--autoencoder", "pixels"]
    assert repa(command) == 0, capsys.readouterr().err
    config = layout.read_config(tmp_path / "run")
    assert config["diffusion"]["objective"] == "ddpm"
    state = load_checkpoint(tmp_path / "run").ema
    model = build_model("DiT-S/2", latent_size=8, latent_channels=4, num_classes=3, hidden_dim=32, depth=2, num_heads=2)
    model.load_state_dict(state)
    x, t, labels = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 10.0, 999.0]), torch.arange(3)
    with torch.no_grad():
        expected = exact_times(theirs)(x, timestep=t, class_labels=labels).sample
        torch.testing.assert_close(call(model, x, t, labels).prediction, expected, atol=2e-4, rtol=1e-3)

    with torch.no_grad():
        second.class_embedder.embedding_table.weight[0] += 1
    theirs.save_pretrained(tmp_path / "other")
    assert repa(["convert", str(tmp_path / "other"), str(tmp_path / "run2")]) == 2
    assert "different embeddings of time and label" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "name"), [("safetensors", "model"), ("diffusers", "diffusion_pytorch_model")])
def test_a_flipped_bit_of_an_export_is_found(form, name, random_run, tmp_path, capsys):
    export(random_run, tmp_path / "out", "--format", form)
    path = tmp_path / "out" / f"{name}.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # in a mantissa, so every number stays finite
    path.write_bytes(data)
    assert repa(["convert", str(tmp_path / "out"), str(tmp_path / "run")]) == 2
    assert f"{path} is damaged: its weights do not match their checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("form", "file", "what"),
    [
        ("safetensors", "config.json", {"num_heads": 4}), ("safetensors", "config.json", {"step": 11}),
        ("diffusers", "repa.json", {"step": 11}), ("diffusers", "config.json", {"sample_size": 8}),
        ("diffusers", "config.json", {"num_attention_heads": 4, "attention_head_dim": 8}),
    ],
)  # fmt: skip
def test_a_changed_number_in_an_exports_description_is_found(form, file, what, random_run, tmp_path, capsys):
    export(random_run, tmp_path / "out", "--format", form)
    path = tmp_path / "out" / file
    values = json.loads(path.read_text())
    for name, value in what.items():
        (values if name in values else values["model"])[name] = value
    path.write_text(json.dumps(values))
    assert repa(["convert", str(tmp_path / "out"), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"{path} does not match its checksum" in said or f"{path} has {next(iter(what))}" in said


@pytest.mark.parametrize(("form", "file"), [("safetensors", "config.json"), ("diffusers", "repa.json")])
def test_an_export_without_a_checksum_is_refused(form, file, random_run, tmp_path, capsys):
    export(random_run, tmp_path / "out", "--format", form)
    path = tmp_path / "out" / file
    values = read_json(path)  # without the seal
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert repa(["convert", str(tmp_path / "out"), str(tmp_path / "run")]) == 2
    assert "cannot be verified: the export has no sha256" in capsys.readouterr().err
