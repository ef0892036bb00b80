import copy

import pytest
import torch
from torch import nn

from repa.base.errors import UserError
from repa.base.trust import command, contents_of
from repa.models import Condition, Hooked, ModelConfig, Tap, build


class Tokens(nn.Module):
    """Adds a token before the grid and returns a tuple."""

    def forward(self, x):
        return torch.cat([x[:, :1] * 2, x[:, 1:] + 1], dim=1), "more"


class Net(nn.Module):
    """A convolutional block, then one on tokens, over a map of 4 channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.tokens, self.unused = nn.Conv2d(4, 4, 3, padding=1), Tokens(), nn.Linear(4, 4)
        self.labels = nn.Embedding(4, 4)

    def forward(self, x, t, labels):
        x = self.conv(x + self.labels(labels)[:, :, None, None] * t[:, None, None, None])
        front, grid = x.mean((2, 3))[:, None], x.flatten(2).transpose(1, 2)
        out, _ = self.tokens(torch.cat([front, grid], dim=1))
        return out[:, 1:].transpose(1, 2).unflatten(2, x.shape[2:])


def call(net, state, t, condition):
    return net(state["x"], t, condition.labels)


def hooked(net=None, blocks=("conv", "tokens"), **changes):
    torch.manual_seed(0)
    net = net or Net()
    settings = {"hidden_dim": 4, "grid": (2, 3), "null_label": 3, "state_shape": (4, 2, 3), **changes}
    return Hooked(net, [getattr(net, name) for name in blocks], call, **settings)


def inputs(n=2):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(n, 4, 2, 3, generator=generator)}, torch.rand(n), Condition(torch.arange(n))


def test_taps_return_the_tokens_of_the_blocks():
    model = hooked()
    state, t, condition = inputs()
    output = model(state, t, condition, (Tap(1), Tap(2)))
    shifted = state["x"] + model.net.labels(condition.labels)[:, :, None, None] * t[:, None, None, None]
    maps = model.net.conv(shifted)
    torch.testing.assert_close(output.taps[Tap(1)], maps.flatten(2).transpose(1, 2))
    torch.testing.assert_close(output.taps[Tap(2)], maps.flatten(2).transpose(1, 2) + 1)
    torch.testing.assert_close(output.prediction["x"], maps + 1)
    assert model(state, t, condition).taps == {}
    output.taps[Tap(2)].sum().backward()
    assert model.net.conv.weight.grad.any()


def test_a_deep_copy_taps_its_own_blocks():
    model = hooked()
    state, t, condition = inputs()
    average = copy.deepcopy(model)
    with torch.no_grad():
        average.net.conv.bias += 5
    wanted = model(state, t, condition, (Tap(1),)).taps[Tap(1)]
    torch.testing.assert_close(average(state, t, condition, (Tap(1),)).taps[Tap(1)], wanted + 5)
    assert average.blocks[0] is average.net.conv


def test_parameters_are_listed_once():
    assert sorted(hooked().state_dict()) == sorted(f"net.{name}" for name in Net().state_dict())
    assert [tuple(p.shape) for p in hooked(blocks=("unused",)).matrices()] == [(4, 4)]
    assert hooked().null(Condition(torch.tensor([0, 1]))).labels.tolist() == [3, 3]


def test_invalid_blocks_and_outputs_are_refused():
    state, t, condition = inputs()
    for taps in [(Tap(3),), (Tap(1, "attention"),)]:
        with pytest.raises(UserError):
            hooked()(state, t, condition, taps)
    with pytest.raises(UserError, match="did not run"):
        hooked(blocks=("unused",))(state, t, condition, (Tap(1),))
    with pytest.raises(UserError, match="of width 4, not 5"):
        hooked(hidden_dim=5)(state, t, condition, (Tap(1),))
    with pytest.raises(UserError):
        hooked(blocks=("conv", "conv"))
    with pytest.raises(UserError):
        Hooked(Net(), [nn.Linear(1, 1)], call, hidden_dim=4, grid=(2, 3), null_label=3, state_shape=(4, 2, 3))
    with pytest.raises(UserError):
        hooked().checkpoint_activations = True
    with pytest.raises(UserError, match="compile"):
        hooked().compile()


def small(config):
    """A network that a test below names by its dotted name."""
    return Net()


def by_name(blocks="conv", name=None, **more):
    settings = ",".join(f"{key}={value}" for key, value in more.items())
    spec = f"hooked:net={name or f'{__name__}.small'},blocks={blocks}{',' if settings else ''}{settings}"
    return ModelConfig(name="SiT-S/1", backbone=spec, patch_size=1, latent_size=3, latent_channels=4, num_classes=3)


def test_the_hooked_backbone_finds_blocks_by_name():
    model = build(by_name())
    state, t, condition = {"x": torch.randn(2, 4, 3, 3)}, torch.rand(2), Condition(torch.tensor([0, 3]))
    output = model(state, t, condition, (Tap(1),))
    assert (model.hidden_dim, model.grid, model.null_label) == (4, (3, 3), 3)
    assert output.taps[Tap(1)].shape == (2, 9, 4)
    torch.testing.assert_close(output.prediction["x"], model.net(state["x"], t, condition.labels))
    with pytest.raises(UserError, match="conv"):
        build(by_name("convs"))


class Inside(nn.Module):
    """A network inside a wrapper with other argument names; the inner network defines the width."""

    def __init__(self):
        super().__init__()
        self.inner = Net()
        self.inner.hidden_size = 4

    def forward(self, x, t, labels):
        return self.inner(x, t, labels)


def inside(config):
    return Inside()


def test_the_width_is_taken_from_the_network_that_contains_the_block():
    model = build(by_name("tokens", f"{__name__}.inside"))
    assert (model.hidden_dim, model.depth) == (4, 1)
    with pytest.raises(UserError, match="add ,hidden_dim="):
        build(by_name("tokens"))


def test_a_private_network_named_by_a_file_is_not_run():
    with contents_of("config.yaml"), pytest.raises(ValueError, match="--trust"):
        by_name(name="mylab.nets.unet")
    with command([]), pytest.raises(ValueError, match="--trust"):
        by_name(name="mylab.nets.unet")
    with command(["--model.backbone", "hooked:net=mylab.nets.unet,blocks=x"]):
        assert by_name(name="mylab.nets.unet").backbone.startswith("hooked")
    with pytest.raises(ValueError, match="dotted"):
        by_name(name="os")
