"""Networks for 512 pixels equal those for 256 with more positions, for any number of latent channels."""

import pytest
import torch

from repa.models import build_model
from repa.models.layers import sincos_positions
from tests.calls import call
from tests.oracles.dit import position


def on_meta(side, channels=4):
    with torch.device("meta"):
        return build_model("SiT-XL/2", latent_size=side, latent_channels=channels, num_classes=1000)


def test_512_pixels_change_only_the_positions():
    at_256, at_512 = on_meta(32), on_meta(64)
    shapes = [
        {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} for model in (at_256, at_512)
    ]
    assert shapes[0] == shapes[1]
    assert sum(p.numel() for p in at_512.parameters() if p.requires_grad) == 674_816_272
    assert (tuple(at_256.pos_embed.shape), tuple(at_512.pos_embed.shape)) == ((1, 256, 1152), (1, 1024, 1152))


@pytest.mark.parametrize(
    ("factor", "channels", "pixels", "tokens"),
    [(8, 4, 512, 1024), (8, 16, 256, 256), (8, 16, 512, 1024), (32, 32, 512, 64), (32, 32, 256, 16)],
)
def test_predictions_of_a_patch_appear_at_the_same_place(factor, channels, pixels, tokens):
    """With a head that returns its token, changing a patch changes the prediction only there."""
    side = pixels // factor
    torch.manual_seed(0)
    model = build_model(
        "SiT-XL/2", latent_size=side, latent_channels=channels, num_classes=2, hidden_dim=8, depth=1, num_heads=2
    )
    torch.nn.init.ones_(model.final_layer.linear.weight[:, :1])
    x, row, column = torch.zeros(1, channels, side, side), side - 4, 2
    at = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    without = call(model, x, *at, (1,))
    x[0, channels - 1, row, column] = 5.0
    output = call(model, x, *at, (1,))
    assert output.hidden[1].shape == (1, tokens, 8)
    changed = (output.prediction - without.prediction).abs() > 1e-3  # (1, C, h, w)
    expected = torch.zeros_like(changed)
    expected[:, :, row : row + 2, column : column + 2] = True
    assert torch.equal(changed, expected)


def test_positions_of_a_32_by_32_grid_are_row_major():
    positions = sincos_positions(8, (32, 32))
    for row, column in ((0, 0), (0, 31), (1, 0), (17, 5), (31, 31)):
        expected = torch.as_tensor(position(row, column, 8)).float()
        torch.testing.assert_close(positions[0, 32 * row + column], expected, atol=1e-6, rtol=1e-5)
    assert len(positions[0].unique(dim=0)) == 1024
