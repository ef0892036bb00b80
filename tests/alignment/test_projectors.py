import pytest
import torch
import torch.nn.functional as F

from repa.alignment import PROJECTORS
from repa.base.errors import UserError


def test_mlp_has_the_published_keys_and_sizes():
    state = PROJECTORS.build("mlp")(8, 12).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "0.weight": (2048, 8),
        "0.bias": (2048,),
        "2.weight": (2048, 2048),
        "2.bias": (2048,),
        "4.weight": (12, 2048),
        "4.bias": (12,),
    }


def test_mlp_is_linear_silu_linear_silu_linear():
    projector = PROJECTORS.build("mlp:width=5")(4, 3)
    w = projector.state_dict()
    x = torch.randn(2, 6, 4)
    h = x @ w["0.weight"].T
    h = (h * torch.sigmoid(h)) @ w["2.weight"].T
    h = (h * torch.sigmoid(h)) @ w["4.weight"].T  # biases start at zero
    assert torch.allclose(projector(x), h, atol=1e-6)


@pytest.mark.parametrize("spec", ["mlp:width=64", "linear", "conv", "conv:kernel=1"])
def test_initial_weights_are_xavier_uniform_and_biases_zero(spec):
    for name, parameter in PROJECTORS.build(spec)(32, 48).named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            field = parameter[0, 0].numel()
            bound = (6 / ((parameter.shape[0] + parameter.shape[1]) * field)) ** 0.5
            assert parameter.abs().max().item() == pytest.approx(bound, rel=0.05)
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_conv_sees_only_the_neighbours_on_the_grid():
    projector = PROJECTORS.build("conv")(3, 5)
    x = torch.randn(1, 25, 3, requires_grad=True)
    projector(x)[0, 12].sum().backward()  # row 2, column 2 of 5 x 5
    assert x.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_conv_keeps_rows_and_columns_apart():
    projector = PROJECTORS.build("conv")(1, 1)
    with torch.no_grad():
        projector.conv.weight.zero_()
        projector.conv.weight[0, 0, 1, 2] = 1  # takes the right-hand neighbour
    x = torch.arange(1.0, 10).view(1, 9, 1)
    assert projector(x).flatten().tolist() == [2, 3, 0, 5, 6, 0, 8, 9, 0]


def test_one_by_one_conv_is_a_linear_layer():
    projector = PROJECTORS.build("conv:kernel=1")(4, 6)
    x = torch.randn(2, 16, 4)
    assert torch.allclose(projector(x), F.linear(x, projector.conv.weight[:, :, 0, 0]), atol=1e-6)


def test_conv_refuses_tokens_without_a_square_grid():
    with pytest.raises(UserError, match="17 tokens are not a square grid"):
        PROJECTORS.build("conv")(3, 5)(torch.randn(1, 17, 3))


@pytest.mark.parametrize("spec", ["conv:kernel=2", "conv:kernel=0", "conv:kernel=3.0", "mlp:width=0", "mlp:width=wide"])
def test_impossible_sizes_are_refused(spec):
    with pytest.raises(UserError, match="kernel|width"):
        PROJECTORS.build(spec)(3, 5)
