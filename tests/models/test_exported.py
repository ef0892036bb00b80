"""Exported folders, and diffusers' DiTTransformer2DModel, give the same outputs as the exported network."""

import json

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.models import DiT, constructor_arguments, load_exported, to_diffusers
from repa.models.diffusers_export import exact_times, for_frequencies_of_diffusers
from repa.models.exported import save_exported
from tests.calls import call


def inputs(t):
    stream = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 6, generator=stream), torch.tensor(t), torch.tensor([1, 5])


@pytest.fixture
def exported(tmp_path, random_dit):
    model = random_dit(qk_norm="layer", mlp_ratio=2.0)
    state = model.state_dict()
    save_exported(tmp_path, state, constructor_arguments(state, num_heads=2), {"step": 5})
    return tmp_path, model


def test_an_exported_network_computes_the_same(exported):
    folder, model = exported
    loaded = load_exported(folder)
    x_t, t, labels = inputs([0.13, 0.82])
    assert torch.equal(call(loaded, x_t, t, labels).prediction, call(model, x_t, t, labels).prediction)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, None])
def test_weights_that_are_not_finite_floats_are_refused(dtype, exported):
    """Loading them would convert integers, drop imaginary parts and keep NaN."""
    folder, name = exported[0], "blocks.0.attn.qkv.weight"
    state = load_file(folder / "model.safetensors")
    state[name] = torch.full_like(state[name], torch.nan) if dtype is None else state[name].to(dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_exported(folder)


def test_damaged_folders_are_refused(exported, tmp_path):
    folder, _ = exported
    with pytest.raises(UserError, match=r"config\.json"):
        load_exported(tmp_path / "absent")
    config = read_json(folder / "config.json")
    for change, sentence in [
        ({"format": 99}, "does not have repa's export format 1"),
        ({"library": "diffusers"}, "does not have repa's export format 1"),
        ({"model": {**config["model"], "depth": 2}}, "does not fit the network of"),
        ({"model": {**config["model"], "widht": 2}}, "widht"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=sentence):
            load_exported(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="cannot be read as a safetensors file"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("learn_sigma", "t"), [(False, [0.13, 0.82]), (False, [0.0, 1.0]), (True, [3.0, 980.0]), (True, [0.0, 999.0])]
)
def test_diffusers_computes_the_same(learn_sigma, t, random_dit, tmp_path):
    from diffusers import DiTTransformer2DModel

    ours = random_dit(learn_sigma=learn_sigma)
    config, state = to_diffusers(ours.state_dict(), 2, unit_times=not learn_sigma)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    theirs, report = DiTTransformer2DModel.from_pretrained(
        tmp_path, output_loading_info=True, local_files_only=True, low_cpu_mem_usage=False
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    x_t, t, labels = inputs(t)
    with torch.no_grad():
        expected = call(ours, x_t, t, labels).prediction
        plain = theirs(x_t, timestep=t, class_labels=labels).sample
        exact = exact_times(theirs)(x_t, timestep=t, class_labels=labels).sample
    found = exact if learn_sigma else plain
    # float32 in another order of operations; at timestep 999 also in the sinusoid's angle
    tolerance = 1e-4 * expected.abs().max()
    assert (found - expected).abs().max() < tolerance
    if t.max() > 0.5:  # the frequencies must have been converted
        assert ((plain if learn_sigma else exact) - expected).abs().max() > 10 * tolerance


def test_norms_exported_to_diffusers_have_our_epsilon(random_dit):
    """On tokens so small that epsilon dominates the norm."""
    from diffusers import DiTTransformer2DModel

    ours = random_dit()
    ours.x_embedder.proj.weight.data *= 1e-3
    ours.x_embedder.proj.bias.data.zero_()
    ours.pos_embed.zero_()
    for block in ours.blocks:  # small gates keep the tokens small
        block.adaLN_modulation[1].weight.data *= 1e-3
        block.adaLN_modulation[1].bias.data *= 1e-3
    config, state = to_diffusers(ours.state_dict(), 2, unit_times=True)
    theirs = DiTTransformer2DModel(**{key: value for key, value in config.items() if key != "_class_name"}).eval()
    theirs.load_state_dict(state)
    theirs.pos_embed.pos_embed.zero_()
    x_t, t, labels = inputs([0.2, 0.7])
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(x_t, timestep=t, class_labels=labels).sample,
            call(ours, x_t, t, labels).prediction,
            rtol=1e-4,
            atol=1e-4,
        )


def test_time_frequencies_convert_to_diffusers():
    """[cos, sin] of 10000^(-k/128) t are linear in those of 10000^(-k/127) t for t in [0, 1], without large weights."""
    weight = torch.randn(5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]

    def features(divisor):
        rates = torch.tensor([10000.0 ** (-k / divisor) for k in range(128)], dtype=torch.float64)
        return torch.cat([(t * rates).cos(), (t * rates).sin()], dim=1)

    folded = for_frequencies_of_diffusers(weight)
    torch.testing.assert_close(features(127) @ folded.T, features(128) @ weight.T, rtol=0, atol=1e-7)
    assert folded.norm() < 1.1 * weight.norm()


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"qk_norm": "layer"}, "qk_norm is layer"),
        ({"mlp_ratio": 2.0}, "MLP ratio is not 4"),
        ({"norm": "rms"}, "norm is rms"),
        ({"rotary": True}, "rotary is True"),
        ({"streams": {"class": 6}}, "streams is"),
    ],
)
def test_networks_that_diffusers_cannot_represent_are_refused(setting, sentence, random_dit):
    with pytest.raises(UserError, match=sentence):
        to_diffusers(random_dit(**setting).state_dict(), 2, unit_times=True)


def test_networks_have_save_pretrained_from_pretrained_and_push_to_hub(random_dit, tmp_path, monkeypatch):
    model = random_dit(qk_norm="rms", heads=[1])
    model.save_pretrained(tmp_path / "saved")
    loaded = DiT.from_pretrained(tmp_path / "saved")
    x_t, t, labels = inputs([0.13, 0.82])
    assert torch.equal(call(loaded, x_t, t, labels).prediction, call(model, x_t, t, labels).prediction)
    assert all(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match="check its name"):
        DiT.from_pretrained(tmp_path / "nothing")

    done = {}

    def upload(self, *, repo_id, folder_path, commit_message):
        done[repo_id] = sorted(path.name for path in folder_path.iterdir())
        return type("Commit", (), {"commit_url": "https://hub/commit"})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **settings: done.update(settings))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert model.push_to_hub("me/net", private=True) == "https://hub/commit"
    assert done == {"private": True, "exist_ok": True, "me/net": ["config.json", "model.safetensors"]}
