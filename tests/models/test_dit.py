import pytest
import torch

from repa.base.errors import UserError
from repa.models import Condition, DiT, ModelConfig, build, build_model
from repa.models.layers import Block
from tests.calls import call
from tests.oracles import dit as oracle


def inputs(n=2, channels=3, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(n, channels, size, size, generator=generator)
    return x_t, torch.rand(n, generator=generator), torch.arange(n) + 4  # the last label is the null label


VARIANTS = [{}, {"learn_sigma": True}, {"qk_norm": "layer"}, {"patch_size": 3}, {"num_classes": 9}]


@pytest.mark.parametrize("arguments", VARIANTS)
def test_forward_equals_the_literal_network(random_dit, arguments):
    model = random_dit(**arguments).double()
    x_t, t, labels = inputs()
    tolerance = 2e-6
    if arguments.get("learn_sigma"):
        t, tolerance = torch.tensor([0.0, 37.0]), 1e-3  # DDPM's timesteps amplify rounding of the frequencies
    out = call(model, x_t.double(), t.double(), labels, taps=(1, 3))
    prediction, hidden = oracle.forward(model.state_dict(), x_t, t, labels, num_heads=2)
    assert out.prediction.abs().max() > 0.1
    torch.testing.assert_close(out.prediction, prediction, rtol=1e-4, atol=tolerance)
    assert sorted(out.hidden) == [1, 3]
    for depth in (1, 3):
        torch.testing.assert_close(out.hidden[depth], hidden[depth], rtol=1e-4, atol=tolerance)
        assert not torch.allclose(hidden[depth], hidden[2], atol=0.1)  # the neighbouring block differs


def test_float32_and_bfloat16_autocast_stay_near_the_literal_network(random_dit):
    model = random_dit()
    x_t, t, labels = inputs()
    prediction, hidden = oracle.forward(model.state_dict(), x_t, t, labels, num_heads=2)
    torch.testing.assert_close(call(model, x_t, t, labels).prediction, prediction.float(), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(model, x_t, t, labels, taps=(3,))
    assert out.hidden[3].dtype == torch.float32  # the residual stream stays in float32
    error = (out.hidden[3] - hidden[3]).norm() / hidden[3].norm()
    assert error < 0.02


def test_small_modulations_survive_autocast(random_dit):
    """1 + 0.001 is 1 in bfloat16, so the modulation must be applied before rounding."""
    model = random_dit(depth=1)
    silu_c = torch.zeros(2, 24)
    x = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(2))
    shifts, scales, gates = torch.zeros(24), torch.full((24,), 2.0**-10), torch.ones(24)
    block = model.blocks[0]
    seen = []
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for scale in (0 * scales, scales):
            block.adaLN_modulation[1].bias.copy_(torch.cat([shifts, scale, gates] * 2))
            with torch.autocast("cpu", torch.bfloat16):
                block(x, silu_c)
    torch.testing.assert_close(seen[1], seen[0] * (1 + 2.0**-10), rtol=1e-6, atol=0)


def test_time_keeps_full_precision_in_every_dtype(random_dit):
    """Neighbouring DDPM timesteps stay distinct when the model is cast or runs under autocast."""
    embed = random_dit().t_embedder
    t = torch.tensor([997.0, 998.0])
    exact = embed(t)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(embed(t), exact, rtol=0, atol=0)
    low = embed.to(torch.bfloat16)
    assert low.frequencies.dtype == torch.float32
    assert (low(t).float() - exact).norm() / exact.norm() < 0.02


def test_train_and_eval_agree(random_dit):
    model = random_dit()
    x_t, t, labels = inputs()
    assert torch.equal(call(model.train(), x_t, t, labels).prediction, call(model.eval(), x_t, t, labels).prediction)


def test_at_initialisation_the_prediction_is_zero_and_blocks_are_the_identity():
    torch.manual_seed(0)
    model = DiT(latent_size=8, hidden_dim=64, depth=4, num_heads=4, num_classes=10)
    x_t, t, labels = inputs(channels=4, size=8)
    out = call(model, x_t, t, labels, taps=(1, 2, 4))
    assert torch.equal(out.prediction, torch.zeros(2, 4, 8, 8))
    tokens = model.x_embedder(x_t) + model.pos_embed
    for depth in (1, 2, 4):
        assert torch.equal(out.hidden[depth], tokens)


def test_initialisation_has_the_published_spreads():
    torch.manual_seed(0)
    model = DiT(latent_size=8, hidden_dim=128, depth=2, num_heads=4, num_classes=1000)
    state = model.state_dict()
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.03)
    fans = {"blocks.0.attn.qkv": (128, 384), "blocks.1.mlp.fc2": (512, 128), "x_embedder.proj": (4 * 2 * 2, 128)}
    for name, (fan_in, fan_out) in fans.items():
        bound = (6 / (fan_in + fan_out)) ** 0.5  # Glorot: uniform within +-bound
        weight = state[f"{name}.weight"]
        assert bound * 0.98 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    for name, value in state.items():
        if name.endswith(".bias") or "adaLN" in name or name.startswith("final_layer"):
            assert not value.any(), name


@pytest.mark.parametrize(
    ("name", "trainable", "positions"),
    [("SiT-B/2", 130_303_504, 196_608), ("SiT-L/2", 457_824_272, 262_144), ("SiT-XL/2", 674_816_272, 294_912)],
)
def test_parameter_counts_match_the_reference(name, trainable, positions):
    with torch.device("meta"):
        model = build_model(name, latent_size=32, num_classes=1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == trainable
    assert model.pos_embed.numel() == positions
    assert "pos_embed" in model.state_dict()
    assert "t_embedder.frequencies" not in model.state_dict()
    projectors = 6  # weights and biases of three linear layers, which the reference includes in its 138 tensors
    if name == "SiT-B/2":
        assert len(model.state_dict()) == 138 - projectors


def test_a_model_built_on_meta_gets_its_frequencies_back(random_dit):
    with torch.device("meta"):
        model = build_model("SiT-S/8", latent_size=8, num_classes=3, depth=1)
    model = model.to_empty(device="cpu")
    assert torch.equal(model.t_embedder.frequencies, random_dit().t_embedder.frequencies)


def test_dit_also_predicts_the_variance():
    with torch.device("meta"):
        sit, dit = (build_model(f"{family}-S/4", latent_size=8, num_classes=3) for family in ("SiT", "DiT"))
    assert sit.final_layer.linear.out_features == 4 * 4 * 4
    assert dit.final_layer.linear.out_features == 4 * 4 * 8
    x_t, t, labels = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
    small = build_model("DiT-S/4", latent_size=8, num_classes=3, hidden_dim=8, depth=1, num_heads=1)
    assert call(small, x_t, t, labels).prediction.shape == (2, 8, 8, 8)


def test_the_built_network_follows_the_configuration():
    size = {"hidden_dim": 16, "depth": 2, "num_heads": 4}
    config = ModelConfig(name="DiT-S/4", latent_size=8, latent_channels=3, num_classes=7, qk_norm="layer", **size)
    model = build(config)
    assert (model.hidden_dim, model.depth, model.patch_size, model.grid) == (16, 2, 4, (2, 2))
    assert (model.latent_channels, model.num_classes, model.null_label) == (3, 7, 7)
    assert model.blocks[0].attn.num_heads == 4
    assert model.blocks[0].attn.q_norm.weight.shape == (4,)
    assert model.final_layer.linear.out_features == 4 * 4 * 6


def test_unlabelled_data_has_only_the_null_label(random_dit):
    model = random_dit(num_classes=0)
    assert model.null_label == 0
    x_t, t, _ = inputs()
    assert call(model, x_t, t, torch.zeros(2, dtype=torch.long)).prediction.shape == x_t.shape


def test_every_parameter_receives_a_gradient(random_dit):
    model = random_dit(qk_norm="layer")
    x_t, t, labels = inputs()
    call(model, x_t, t, labels).prediction.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_invalid_input_is_refused(random_dit):
    model = random_dit()
    x_t, t, labels = inputs()
    for tap in (0, 4):
        with pytest.raises(UserError, match=f"block {tap}.*1 to 3"):
            call(model, x_t, t, labels, taps=(2, tap))
    with pytest.raises(UserError, match=r"\(N, 3, 6, 6\), but got \(2, 3, 8, 8\)"):
        call(model, torch.zeros(2, 3, 8, 8), t, labels)
    with pytest.raises(UserError, match=r"latent_size 7.*patches of 2"):
        random_dit(latent_size=7)
    with pytest.raises(UserError, match="num_heads 5"):
        random_dit(num_heads=5)
    with pytest.raises(UserError, match=r"multiple of 4.*for example 28"):
        random_dit(hidden_dim=26)
    with pytest.raises(UserError, match="num_classes of at least 0"):
        random_dit(num_classes=-1)
    with pytest.raises(UserError, match="Did you mean 'SiT-XL/2'"):
        build_model("SiT-XXL/2", latent_size=32, num_classes=10)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_recomputed_activations_give_the_same_bits(random_dit, precision, monkeypatch):
    x_t, t, labels = inputs()
    calls, found = [], []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *args: calls.append(1) or forward(*args))
    for recompute in (False, True):
        model = random_dit()
        model.checkpoint_activations = recompute
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            out = call(model, x_t, t, labels, taps=(2,))
            loss = out.prediction.float().square().sum() + out.hidden[2].float().square().sum()
        loss.backward()
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert len(calls) == 3 + 2 * 3  # the second model runs each of its three blocks twice
    with torch.no_grad():
        call(model, x_t, t, labels)
    assert len(calls) == 9 + 3


def test_networks_can_be_built_on_the_meta_device():
    with torch.device("meta"):
        model = build_model("SiT-XL/2", latent_size=32, num_classes=1000)
        out = call(model, torch.zeros(2, 4, 32, 32), torch.zeros(2), torch.zeros(2, dtype=torch.long), (8,))
    assert out.prediction.is_meta
    assert (out.prediction.shape, out.hidden[8].shape) == ((2, 4, 32, 32), (2, 256, 1152))


def test_a_network_without_a_route_refuses_routed_tokens(random_dit):
    x_t, t, labels = inputs()
    with pytest.raises(UserError, match="has no route"):
        random_dit()({"x": x_t}, t, Condition(labels), keep=torch.zeros(2, 0, dtype=torch.long))
