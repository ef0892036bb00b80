"""Weight folders with wrong descriptions: no traceback, and no network is built before it fits its weights."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.base.weights import read_weights
from repa.models import DiT, load_exported
from repa.models.lora import merged_weights
from repa.models.published import load_published
from tests.hostile.commands import outcome
from tests.hostile.mutations import HOSTILE

# besides arbitrary values: sizes that would be built without end
ENDLESS = {
    "depth": 2**31,
    "latent_size": 2**31,
    "heads": list(range(1, 10**5)),
    "streams": {"a": 2**40},
    "mlp_ratio": 1e308,
}
ROUTES = ([1, 10**9, 1, 0, "fuse", 0], [1, 2, 0.5, -1, "fuse", 0], [1, 2, 0.5, 0, "x", 0], [1], {"first": 1}, "ab")


@pytest.fixture
def exported(tmp_path):
    network = DiT(latent_size=4, latent_channels=3, patch_size=2, hidden_dim=16, depth=2, num_heads=2, num_classes=2)
    network.save_pretrained(tmp_path / "exported")
    return tmp_path / "exported"


def loads(folder, config) -> bool:
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load_exported(folder)
    except UserError:
        return False
    return True


def test_the_description_of_an_exported_network_is_checked_before_it_is_built(exported):
    config = read_json(exported / "config.json")  # without the seal
    for name in config["model"]:
        for value in HOSTILE[::3] if name not in ENDLESS else (*HOSTILE[::3], ENDLESS[name]):
            changed = copy.deepcopy(config)
            changed["model"][name] = value
            loads(exported, changed)  # an error or a network; any other exception fails the test
    for name, value in [*ENDLESS.items(), *(("route", route) for route in ROUTES)]:
        assert not loads(exported, {**config, "model": {**config["model"], name: value}}), name
    for model in HOSTILE:
        assert not loads(exported, {**config, "model": model})
    assert loads(exported, config)


@pytest.mark.parametrize(
    "lie",
    [
        {"sample_size": 2**30}, {"sample_size": 1}, {"num_layers": 2**40}, {"attention_head_dim": 2**30}, {"num_attention_heads": 3},
        {"patch_size": 7}, {"norm_eps": [1]}, {"_class_name": {}},
    ],
)  # fmt: skip
def test_a_diffusers_dit_with_a_wrong_configuration_is_refused(lie, random_run, tmp_path):
    assert outcome(["export", str(random_run), str(tmp_path / "e"), "--format", "diffusers"])[0] == 0
    path = tmp_path / "e" / "config.json"
    path.write_text(json.dumps({**read_json(path), **lie}))
    code, said = outcome(["convert", str(tmp_path / "e"), str(tmp_path / "run")])
    assert code == 2, said


@pytest.mark.parametrize(
    "lie", [{"step": -1}, {"step": "x"}, {"step": 2**70}, {"diffusion": {"objective": []}}, {"kind": 3}]
)
@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_wrong_facts_of_an_export_are_refused(form, lie, random_run, tmp_path):
    assert outcome(["export", str(random_run), str(tmp_path / "e"), "--format", form])[0] == 0
    path = tmp_path / "e" / ("repa.json" if form == "diffusers" else "config.json")
    path.write_text(json.dumps({**read_json(path), **lie}))
    code, said = outcome(["convert", str(tmp_path / "e"), str(tmp_path / "run")])
    assert code == 2 or (code == 0 and "kind" in lie), said


def test_weights_of_wrong_shapes_in_a_diffusers_folder_are_refused(random_run, tmp_path):
    assert outcome(["export", str(random_run), str(tmp_path / "e"), "--format", "diffusers"])[0] == 0
    path = tmp_path / "e" / "diffusion_pytorch_model.safetensors"
    # copies, because older safetensors would write into the file that the tensors map
    whole = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in [*whole][:: max(1, len(whole) // 8)]:
        save_file({**whole, name: whole[name].flatten()[:3].clone()}, path)
        code, said = outcome(["convert", str(tmp_path / "e"), str(tmp_path / "run")])
        assert code == 2, (name, said)


@pytest.mark.parametrize(
    ("down", "up"), [((2,), (4, 2)), ((), (4,)), ((), ()), ((2, 4, 1), (4, 2)), ((2, 3), (4, 2)), ((2, 4), (4, 3))]
)
def test_an_update_that_does_not_fit_is_refused(down, up):
    state = {"l.weight": torch.zeros(4, 4), "l.lora_A": torch.zeros(down), "l.lora_B": torch.zeros(up)}
    with pytest.raises(UserError, match="does not fit"):
        merged_weights(state)


def weights():
    return DiT(
        latent_size=4, latent_channels=3, patch_size=2, hidden_dim=16, depth=2, num_heads=2, num_classes=2
    ).state_dict()


def test_weights_under_another_ending_are_read(tmp_path):
    state = weights()
    for name in ("x.pt", "x.SAFETENSORS", "x"):
        save_file(state, tmp_path / name)
        assert torch.equal(read_weights(tmp_path / name)["pos_embed"], state["pos_embed"])


def test_numpy_arrays_and_texts_beside_the_weights_are_no_obstacle(tmp_path):
    state = weights()
    rest = {"random": np.random.default_rng(0).integers(0, 9, 5), "state": ("MT19937", np.arange(6)), "x": np.str_("a")}
    torch.save({"model": state, **rest}, tmp_path / "x.pt")
    assert torch.equal(load_published(tmp_path / "x.pt", "repa").ema["pos_embed"], state["pos_embed"])


@pytest.mark.parametrize("other", ["target_model", "teacher", "discriminator"])
def test_a_second_network_beside_model_needs_a_choice(other, tmp_path):
    first, second = weights(), {name: tensor + 1 for name, tensor in weights().items()}
    torch.save({"model": first, other: second}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"several networks, 'model', '{other}': give one of them as --weights"):
        load_published(tmp_path / "x.pt", "repa")
    found = load_published(tmp_path / "x.pt", "repa", other).ema["pos_embed"]
    assert torch.equal(found, second["pos_embed"])
