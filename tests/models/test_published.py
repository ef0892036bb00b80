import argparse

import pytest
import torch
from safetensors.torch import save_file

from repa.base.errors import UserError
from repa.models import DiT, constructor_arguments, load_published, to_published
from tests.calls import call
from tests.oracles import dit, published


def loaded(state, num_heads=2):
    model = DiT(**constructor_arguments(state, num_heads))
    model.load_state_dict(state)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 6, 6, generator=generator), torch.tensor([0.13, 0.82]), torch.tensor([1, 5])


@pytest.fixture
def repa_state(random_dit):
    projectors = {f"projectors.0.{i}.{kind}": torch.randn(4) for i in (0, 2, 4) for kind in ("weight", "bias")}
    return {**random_dit(qk_norm="layer").state_dict(), **projectors, "projectors.1.0.weight": torch.ones(2)}


@pytest.mark.parametrize("wrapped", ["bare", "training", "ddp", "legacy", "safetensors"])
def test_repa_checkpoints_are_read(tmp_path, repa_state, wrapped):
    path = tmp_path / ("c.safetensors" if wrapped == "safetensors" else "c.pt")
    if wrapped == "safetensors":
        save_file(repa_state, path)
    else:
        # raw weights, which must not be used instead of the EMA
        live = {key: value + 1 for key, value in repa_state.items()}
        content = {
            "bare": repa_state,
            "training": {"model": live, "ema": repa_state, "opt": {}, "args": argparse.Namespace(seed=0)},
            "ddp": {"model": {f"module.{key}": value for key, value in repa_state.items()}},
            "legacy": published.legacy_repa(repa_state, depth=2),
        }[wrapped]
        torch.save(content, path)
    state, projectors, *_ = load_published(path, "repa")
    layers = {f"0.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert projectors.keys() == layers | {"1.0.weight"}
    assert torch.equal(projectors["0.2.bias"], repa_state["projectors.0.2.bias"])
    x_t, t, labels = inputs()
    expected, _ = dit.forward(repa_state, x_t, t, labels, num_heads=2)
    torch.testing.assert_close(call(loaded(state), x_t, t, labels).prediction, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_sit_is_reversed_in_time_and_sign(random_dit, learn_sigma):
    sit = random_dit(learn_sigma=learn_sigma).state_dict()
    before = {key: value.clone() for key, value in sit.items()}
    state, projectors, *_ = load_published(sit, "sit")
    assert projectors == {}
    assert all(torch.equal(sit[key], before[key]) for key in sit)  # the input is unchanged
    x_t, t, labels = inputs()
    expected = -published.sit_velocity(sit, x_t, 1 - t, labels, num_heads=2)
    assert not torch.allclose(expected, -published.sit_velocity(sit, x_t, t, labels, num_heads=2), atol=0.1)
    model = loaded(state).double()
    torch.testing.assert_close(call(model, x_t.double(), t.double(), labels).prediction, expected, rtol=1e-4, atol=1e-5)


def test_dit_keeps_the_variance_channels(random_dit):
    state = load_published(random_dit(learn_sigma=True).state_dict(), "dit").ema
    x_t, _, labels = inputs()
    t = torch.tensor([3.0, 980.0])
    expected, _ = dit.forward(state, x_t, t, labels, num_heads=2)
    assert expected.shape == (2, 6, 6, 6)
    torch.testing.assert_close(call(loaded(state), x_t, t, labels).prediction, expected.float(), rtol=1e-3, atol=1e-3)


def test_the_configuration_is_read_from_tensor_shapes(random_dit):
    given = {"latent_size": 9, "latent_channels": 2, "patch_size": 3, "hidden_dim": 8, "depth": 2, "num_heads": 4}
    given |= {
        "num_classes": 7,
        "mlp_ratio": 2.0,
        "learn_sigma": True,
        "qk_norm": "layer",
        "heads": (1,),
        "streams": {"class": 6},
        "norm": "layer",
        "mlp": "gelu",
        "bias": True,
        "rotary": False,
        "patch_overlap": 1,
    }
    state = random_dit(**given).state_dict()
    assert constructor_arguments(state, num_heads=4, patch_overlap=1) == given
    given |= {"norm": "rms", "mlp": "swiglu", "qk_norm": "rms", "bias": False, "rotary": True, "mlp_ratio": 4.0}
    given |= {"hidden_dim": 24, "num_heads": 2}
    state = random_dit(**given).state_dict()
    assert constructor_arguments(state, num_heads=2, patch_overlap=1) == given
    with pytest.raises(UserError, match=r"\(norm is rms\): use `repa export`"):
        to_published(state, {}, "dit")
    with pytest.raises(UserError, match="width 24 and depth 2: give the number of heads"):
        constructor_arguments(state)
    with torch.device("meta"):
        named = DiT(latent_size=32, hidden_dim=1152, depth=28, num_heads=16, num_classes=1000)
    assert constructor_arguments(named.state_dict())["num_heads"] == 16


def test_invalid_input_is_refused(tmp_path, random_dit):
    state = random_dit().state_dict()
    without = {key: value for key, value in state.items() if key != "blocks.1.mlp.fc1.bias"}
    wrong = {**state, "blocks.2.attn.proj.weight": torch.zeros(24, 23)}
    for content, message in [
        (without, "no 'blocks.1.mlp.fc1.bias'"),
        ({**state, "blocks.0.extra": torch.zeros(1)}, "unknown tensor 'blocks.0.extra'"),
        (wrong, r"shape \(24, 23\), not \(24, 24\)"),
        ({"encoder.weight": torch.zeros(2)}, "no 'x_embedder.proj.weight'"),
        ({**state, "x_embedder.proj.weight": torch.zeros(24, 3)}, "do not fit together"),
        ({"steps": 3}, "contains no state dict"),
        ({}, "contains no state dict"),
    ]:
        with pytest.raises(UserError, match=message):
            load_published(content, "repa")
    with pytest.raises(UserError, match=r"unknown tensor 'projectors\.0\.0\.weight'"):
        load_published({**state, "projectors.0.0.weight": torch.zeros(1)}, "sit")
    with pytest.raises(UserError, match="Did you mean 'repa'"):
        load_published(state, "reap")
    with pytest.raises(UserError, match="There is no checkpoint file"):
        load_published(tmp_path / "absent.pt", "dit")


class Payload:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code in a checkpoint was run')",))


@pytest.mark.parametrize("name", ["c.pt", "c.safetensors"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut", "code"])
def test_damaged_files_are_refused(tmp_path, random_dit, name, damage):
    path = tmp_path / name
    if damage == "code":
        torch.save({"model": Payload()}, path)
    elif damage == "cut":
        state = random_dit().state_dict()
        torch.save(state, path) if name.endswith("pt") else save_file(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text({"empty": "", "text": "<html>404: not found</html>"}[damage])
    with pytest.raises(UserError, match="class exec" if (damage, path.suffix) == ("code", ".pt") else "cannot be read"):
        load_published(path, "repa")
