import pytest
import torch

from repa.base.errors import UserError
from repa.models import Condition, ModelConfig, Tap, build, build_model
from repa.models.jit import JiT, MaskedAdapter, jit_dimensions

SIZES = {"hidden_dim": 16, "depth": 3, "num_heads": 2, "bottleneck": 6, "class_tokens": 2, "class_tokens_from": 1}


def network(**changes):
    torch.manual_seed(0)
    model = JiT(**{"latent_size": (8, 12), "patch_size": 4, "num_classes": 3, **SIZES, **changes})
    for parameter in model.parameters():  # the zeros of adaLN-Zero would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    state = {"x": torch.randn(n, 3, 8, 12, generator=generator)}
    return state, torch.rand(n, generator=generator), Condition(torch.arange(n) % 4)


def test_the_initial_prediction_is_zero():
    model = JiT(latent_size=8, patch_size=4, num_classes=3, **SIZES)
    prediction = model({"x": torch.randn(1, 3, 8, 8)}, torch.rand(1), Condition(torch.tensor([1]))).prediction["x"]
    assert prediction.shape == (1, 3, 8, 8)
    assert not prediction.any()


def test_gradients_reach_every_parameter():
    model = network()
    model(*inputs()).prediction["x"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_images_are_independent():
    model = network()
    state, t, condition = inputs()
    together = model(state, t, condition).prediction["x"]
    alone = model({"x": state["x"][1:2]}, t[1:2], Condition(condition.labels[1:2])).prediction["x"]
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_tokens", [0, 2])
def test_taps_contain_only_grid_tokens(class_tokens):
    model = network(class_tokens=class_tokens)
    seen = []
    model.blocks[2].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.blocks[2].register_forward_hook(lambda _, args, out: seen.append(out[0]))
    output = model(*inputs(), (Tap(1), Tap(3), Tap(3, "attention")))
    assert output.taps[Tap(1)].shape == (3, 6, 16)
    torch.testing.assert_close(output.taps[Tap(3)], seen[1][:, class_tokens:])
    attention = model.blocks[2].attn
    q, k = attention.qkv(seen[0]).reshape(3, -1, 3, 2, 8)[:, :, :2].unbind(2)  # (N, S + T, h, d)
    q, k = attention.q_norm(q), attention.k_norm(k)
    places = [(0, 0)] * class_tokens + [(row, column) for row in range(2) for column in range(3)]
    rates = [1.0, 0.01]  # two channel pairs for the row, two for the column
    for each in (q, k):
        for token, (row, column) in enumerate(places):
            for pair in range(4):
                angle = torch.tensor((row if pair < 2 else column) * rates[pair % 2])
                a, b = each[:, token, :, 2 * pair].clone(), each[:, token, :, 2 * pair + 1].clone()
                each[:, token, :, 2 * pair] = a * angle.cos() - b * angle.sin()
                each[:, token, :, 2 * pair + 1] = a * angle.sin() + b * angle.cos()
    logits = torch.einsum("nqhd,nkhd->nhqk", q, k) / 8**0.5
    torch.testing.assert_close(
        output.taps[Tap(3, "attention")], logits[:, :, class_tokens:, class_tokens:], rtol=1e-4, atol=1e-4
    )


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = network()
        model.checkpoint_activations = checkpointed
        model(*inputs()).prediction["x"].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_the_network_compiles_in_one_graph():
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    taps = (Tap(1), Tap(3, "attention"))
    wanted, found = model(*inputs(), taps), compiled(*inputs(), taps)
    torch.testing.assert_close(found.prediction["x"], wanted.prediction["x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.taps, wanted.taps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "millions"),  # table 9 of arXiv 2511.13720; patches of 32 are at 512 pixels
    [("JiT-B/16", 131), ("JiT-L/16", 459), ("JiT-H/16", 953), ("JiT-B/32", 133), ("JiT-L/32", 462), ("JiT-H/32", 956)],
)
def test_parameter_counts_match_the_paper(name, millions):
    side = 16 * int(name.rpartition("/")[2])
    config = ModelConfig(name=name, backbone="jit", latent_size=side, latent_channels=3, num_classes=1000)
    with torch.device("meta"):
        models = build(config), build_model(name, latent_size=side, num_classes=1000)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in models]
    assert shapes[0] == shapes[1]
    assert round(sum(p.numel() for p in models[0].parameters()) / 1e6) == millions


def test_class_tokens_enter_at_the_papers_block():
    found = {name: jit_dimensions(name)["class_tokens_from"] for name in ("JiT-B/16", "JiT-L/16", "JiT-H/16")}
    assert found == {"JiT-B/16": 4, "JiT-L/16": 8, "JiT-H/16": 10}
    with pytest.raises(UserError, match="backbone jit"):
        ModelConfig.parse({"name": "JiT-B/16"})


def test_invalid_input_is_refused():
    state, t, condition = inputs()
    with pytest.raises(UserError):
        network()(state, t[:, None].expand(-1, 6), condition)
    with pytest.raises(UserError):
        network(hidden_dim=12)
    with pytest.raises(UserError):
        network(class_tokens_from=3)
    with pytest.raises(UserError):
        jit_dimensions("JiT-B/8")


def test_the_adapter_ignores_masked_tokens():
    torch.manual_seed(0)
    adapter = MaskedAdapter(16, 5, (2, 3), num_classes=3, num_heads=2, class_tokens=2)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden, t, labels = torch.randn(2, 6, 16), torch.rand(2), torch.tensor([0, 3])
    keep = torch.tensor([[True, False, True, True, True, True], [True] * 6])
    found = adapter(hidden, t, Condition(labels), keep)
    found.square().sum().backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()] == []
    other = hidden.clone()
    other[0, 1] += 1
    torch.testing.assert_close(adapter(other, t, Condition(labels), keep), found)
    other[1, 1] += 1
    assert not torch.allclose(adapter(other, t, Condition(labels), keep)[1], found[1])
