import pytest
import torch
from torch import nn

from repa.base.errors import UserError
from repa.models import build_model
from repa.models.lora import LoRALinear, merged_weights, use_lora
from tests.calls import call


def network():
    torch.manual_seed(0)
    model = build_model("SiT-S/2", latent_size=4, latent_channels=2, num_classes=3, hidden_dim=16, depth=2, num_heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def predictions(model):
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(3, 2, 4, 4, generator=stream)
    return call(model, x, torch.tensor([0.1, 0.5, 0.9]), torch.arange(3)).prediction


def test_an_update_starts_at_zero_and_merges_into_the_weights():
    model = network()
    before = predictions(model)
    names = use_lora(model, 4)
    assert names == [f"blocks.{b}.{layer}" for b in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert torch.equal(predictions(model), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names) + 1
    assert all(name.endswith(("lora_A", "lora_B")) or name.startswith("y_embedder.") for name in trained)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.3)
    changed = predictions(model)
    assert not torch.allclose(changed, before, atol=1e-2)
    plain = network()
    plain.load_state_dict(merged_weights(model.state_dict()))
    torch.testing.assert_close(predictions(plain), changed, rtol=1e-4, atol=1e-4)


def test_an_update_is_the_product_of_its_factors():
    layer = nn.Linear(3, 2)
    layer.__class__ = LoRALinear
    layer.add_update(1)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [-1.0]]))
    x = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + torch.tensor([[6.0, -6.0]]))


def test_invalid_updates_are_refused_and_plain_weights_are_kept():
    model = network()
    state = model.state_dict()
    assert merged_weights(state).keys() == state.keys()
    with pytest.raises(UserError, match="choose a smaller rank"):
        use_lora(model, 16)
    with pytest.raises(UserError, match="does not fit"):
        merged_weights({**state, "blocks.0.attn.qkv.lora_A": torch.zeros(2, 16)})
