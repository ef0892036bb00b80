import pytest
import torch

from repa.alignment import PROJECTORS
from repa.base.errors import UserError
from repa.models import Condition, MMDiT, Tap
from repa.models.layers import by_head
from tests import golden
from tests.oracles import mmdit as oracle

SIZES = {"latent_size": (4, 6), "hidden_dim": 16, "depth": 2, "num_heads": 2, "text_shape": (3, 5)}


def network(**changes):
    torch.manual_seed(0)
    model = MMDiT(**{**SIZES, **changes})
    for parameter in model.parameters():  # the zeros of adaLN-Zero would hide errors
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    state = {"x": torch.randn(n, 4, 4, 6, generator=generator)}
    mask = torch.ones(n, 3, dtype=torch.bool)
    mask[0, 2] = False
    text = torch.randn(n, 3, 5, generator=generator)
    return state, torch.rand(n, generator=generator), Condition(torch.zeros(n, dtype=torch.int64), text, mask)


def test_parameter_counts_match_the_paper():
    wanted = golden.load("mmdit_parameters")["expected"]
    with torch.device("meta"):
        model = MMDiT(latent_size=32, reference_init=True)
    parts = {**wanted["by_module"], "blocks": wanted["by_module"]["joint_blocks"]}
    for name in ("x_embedder", "t_embedder", "context_embedder", "blocks", "final_layer"):
        assert sum(p.numel() for p in model.get_submodule(name).parameters()) == parts[name], name
    with torch.device("meta"):
        projector = PROJECTORS.build("mlp")(768, 768)
    assert sum(p.numel() for p in projector.parameters()) == wanted["projector"]
    assert sum(p.numel() for p in [*model.parameters(), *projector.parameters()]) == 512_415_504


def test_forward_equals_the_literal_network():
    """The released network attends to all text tokens, without a mask."""
    model = network().double()
    state, t, condition = inputs()
    x, t, text = state["x"].double(), t.double(), condition.text.double()
    output = model({"x": x}, t, Condition(condition.labels, text), (Tap(1), Tap(2)))
    for n in range(2):
        prediction, hidden = oracle.forward(model.state_dict(), x[n], float(t[n]), text[n], num_heads=2)
        torch.testing.assert_close(output.prediction["x"][n], prediction, rtol=0, atol=1e-6)
        for depth in (1, 2):
            torch.testing.assert_close(output.taps[Tap(depth)][n], hidden[depth], rtol=0, atol=1e-6)


def test_the_initial_prediction_is_zero_unless_reference_init_is_set():
    state, t, condition = inputs()
    assert not MMDiT(**SIZES)(state, t, condition).prediction["x"].any()
    assert MMDiT(**SIZES, reference_init=True)(state, t, condition).prediction["x"].abs().max() > 0.01


def test_gradients_reach_every_parameter():
    model = network()
    model(*inputs()).prediction["x"].square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_masked_text_and_other_images_have_no_influence():
    model = network()
    state, t, condition = inputs()
    found = model(state, t, condition).prediction["x"]
    assert found.shape == (2, 4, 4, 6)
    text = condition.text.clone()
    text[0, 2] += 1
    torch.testing.assert_close(model(state, t, condition._replace(text=text)).prediction["x"], found)
    text[0, 1] += 1
    changed = model(state, t, condition._replace(text=text)).prediction["x"]
    assert not torch.allclose(changed[0], found[0])
    torch.testing.assert_close(changed[1], found[1])
    short = Condition(condition.labels[:1], condition.text[:1, :2])
    other = network(text_shape=(2, 5))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "null" not in k}, strict=False)
    torch.testing.assert_close(
        other({"x": state["x"][:1]}, t[:1], short).prediction["x"], found[:1], rtol=1e-4, atol=1e-5
    )


def test_taps_return_the_image_stream():
    model = network()
    seen = []
    model.blocks[0].register_forward_hook(lambda _, args, out: seen.extend([args, out]))
    output = model(*inputs(), (Tap(1), Tap(1, "attention")))
    torch.testing.assert_close(output.taps[Tap(1)], seen[1][1])
    assert output.taps[Tap(1)].shape == (2, 6, 16)
    qkv, _ = model.blocks[0].image.before(seen[0][1], seen[0][2])
    q, k, _ = by_head(qkv, model.blocks[0].num_heads)
    wanted = torch.einsum("nhqd,nhkd->nhqk", q, k) / 8**0.5
    torch.testing.assert_close(output.taps[Tap(1, "attention")], wanted, rtol=1e-4, atol=1e-5)


def test_patches_may_overlap():
    """The prediction of a token also covers pixels around its patch."""
    model = network(patch_overlap=1)
    state, t, condition = inputs()
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.nn.init.ones_(model.final_layer.linear.bias)
    found = model(state, t, condition).prediction["x"]
    assert found.shape == (2, 4, 4, 6)
    assert found[0, 0].tolist() == [[1, 2, 2, 2, 2, 1], [2, 4, 4, 4, 4, 2], [2, 4, 4, 4, 4, 2], [1, 2, 2, 2, 2, 1]]


def test_a_missing_text_equals_the_encoded_empty_text():
    model = network()
    _, _, condition = inputs()
    model.null_text.fill_(0.5)
    model.null_mask[1:] = False
    null = model.null(condition)
    assert null.text.shape == (2, 3, 5)
    assert null.text.unique().tolist() == [0.5]
    assert null.text_mask.tolist() == [[True, False, False]] * 2
    assert model.null(condition._replace(text_mask=None)).text_mask is None


def test_recomputed_and_compiled_blocks_give_the_same():
    model = network()
    taps = (Tap(1), Tap(2, "attention"))
    wanted = model(*inputs(), taps)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs(), taps)
    torch.testing.assert_close(found.prediction["x"], wanted.prediction["x"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.taps, wanted.taps, rtol=1e-4, atol=1e-5)
    gradients = []
    for model.checkpoint_activations in (False, True):
        model.zero_grad()
        model(*inputs()).prediction["x"].square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_invalid_input_is_refused():
    state, t, condition = inputs()
    with pytest.raises(UserError, match="text"):
        network()(state, t, Condition(condition.labels))
    with pytest.raises(UserError, match="text"):
        network()(state, t, condition._replace(text=condition.text[:, :2]))
    with pytest.raises(UserError):
        network()(state, t[:, None].expand(-1, 6), condition)
