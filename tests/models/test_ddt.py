import pytest
import torch

from repa.base.errors import UserError
from repa.models import DDT, Condition, DDTOptions, ModelConfig, Tap, build
from repa.models.layers import BlockOptions

SIZES = {
    "latent_channels": 3,
    "patch_size": 2,
    "hidden_dim": 16,
    "depth": 5,
    "num_heads": 2,
    "num_classes": 3,
    "head_depth": 2,
}
PAPERS = {
    "ddt": {"qk_norm": "rms", "bias": False, "final_norm": "layer", "extent": 16.0, "max_period": 10.0},
    "rae": {"head_dim": 24, "head_heads": 3, "positions": True, "times": "fourier", "silu_twice": True},
    "raev2": {
        "head_dim": 24, "head_heads": 3, "times": "fourier", "silu_twice": True, "time_tokens": 2, "class_tokens": 3,
        "qk_norm": "rms", "heads": (2,),
    },
}  # fmt: skip


def ddt(**arguments):
    """A DDT; keyword arguments may belong to the network, its options or its blocks."""
    options = {name: arguments.pop(name) for name in DDTOptions.__dataclass_fields__ if name in arguments}
    blocks = {name: arguments.pop(name) for name in BlockOptions._fields if name in arguments}
    return DDT(DDTOptions(**options), BlockOptions(**{"norm": "rms", "mlp": "swiglu", **blocks}), **arguments)


def network(paper="rae", **changes):
    torch.manual_seed(0)
    model = ddt(**{"latent_size": (4, 6), **SIZES, **PAPERS[paper], **changes})
    for parameter in model.parameters():  # the zeros of adaLN-Zero would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    state = {"x": torch.randn(n, 3, 4, 6, generator=generator)}
    return state, torch.rand(n, generator=generator), Condition(torch.arange(n) % 4)


@pytest.mark.parametrize("paper", PAPERS)
def test_the_initial_prediction_is_zero(paper):
    output = ddt(latent_size=(4, 6), **SIZES, **PAPERS[paper])(*inputs())
    for prediction in (output.prediction["x"], *output.heads.values()):
        assert prediction.shape == (3, 3, 4, 6)
        assert not prediction.any()


@pytest.mark.parametrize("paper", PAPERS)
def test_gradients_reach_every_parameter(paper):
    model = network(paper)
    output = model(*inputs())
    sum(part.square().sum() for part in (output.prediction["x"], *output.heads.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("paper", PAPERS)
def test_images_are_independent_and_recomputed_activations_agree(paper):
    model = network(paper)
    state, t, condition = inputs()
    together = model(state, t, condition).prediction["x"]
    alone = model({"x": state["x"][1:2]}, t[1:2], Condition(condition.labels[1:2])).prediction["x"]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    model.checkpoint_activations = True
    assert torch.equal(model(state, t, condition).prediction["x"], together)


def test_taps_contain_only_grid_tokens_with_the_encoders_width():
    model = network("raev2")
    output = model(*inputs(), (Tap(3), Tap(2, "attention")))
    assert output.taps[Tap(3)].shape == (3, 6, 16)
    assert output.taps[Tap(2, "attention")].shape == (3, 2, 6, 6)
    assert (model.tapped_depth, network("ddt").tapped_depth) == (3, 5)
    with pytest.raises(UserError, match="Block 4 is in the head, which has the width 24"):
        model(*inputs(), (Tap(4),))
    assert network("ddt")(*inputs(), (Tap(5),)).taps[Tap(5)].shape == (3, 6, 16)


def test_the_head_can_reuse_an_earlier_encoding():
    model = network("ddt")
    state, t, condition = inputs()
    encoded = model.encode(state, t, condition)
    whole = model(state, t, condition).prediction["x"]
    assert torch.equal(model.decode(state, encoded).prediction["x"], whole)
    other = {"x": state["x"] + 1}
    assert not torch.allclose(model.decode(other, encoded).prediction["x"], whole)


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({"latent_size": 32, "patch_size": 2, "depth": 28, "head_depth": 6, "latent_channels": 4, **PAPERS["ddt"]}, 675),
        (
            {"latent_size": 16, "patch_size": 1, "depth": 30, "head_depth": 2, "latent_channels": 768}
            | PAPERS["rae"] | {"head_dim": 2048, "head_heads": 16},
            838,  # the paper also counts the fixed positions: 839
        ),
    ],
)  # fmt: skip
def test_parameter_counts_match_the_papers(arguments, millions):
    """DDT-XL/2 and DiT^DH-XL."""
    with torch.device("meta"):
        model = ddt(hidden_dim=1152, num_heads=16, num_classes=1000, **arguments)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_invalid_input_is_refused():
    model = network()
    state, t, condition = inputs()
    with pytest.raises(UserError, match="supports neither token times"):
        model(state, t[:, None].expand(-1, 6), condition)
    with pytest.raises(UserError, match="head_depth is 5"):
        network(head_depth=5)
    with pytest.raises(UserError, match=r"heads has block 4.*1 to 3"):
        network(heads=(4,))
    for setting, given in (("times", "sine"), ("head_dim", -1), ("max_period", 0)):
        with pytest.raises(ValueError, match=f"'{setting}'.*'?{given}'?"):
            ModelConfig(backbone=f"ddt:head_depth=1,{setting}={given}")
    complete = {"latent_size": 4, "latent_channels": 3, "num_classes": 3, "hidden_dim": 16, "depth": 3, "num_heads": 2}
    with pytest.raises(UserError, match="'ddt' has no separate_times"):
        build(ModelConfig(backbone="ddt:head_depth=1", separate_times=True, **complete))


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_it_compiles_in_one_graph(paper):
    """Forward and backward are traced as in training; tests/training/test_compile.py covers the default backend."""
    model = network(paper)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    state, t, condition = inputs()
    output = compiled(state, t, condition, (Tap(2),))
    torch.testing.assert_close(output.prediction["x"], model(state, t, condition).prediction["x"], rtol=1e-4, atol=1e-5)
    output.taps[Tap(2)].sum().backward()
