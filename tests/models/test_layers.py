import math

import torch

from repa.models.layers import sincos_positions, timestep_frequencies, unpatchify
from tests.oracles import dit as oracle


def test_positions_are_the_literal_sinusoids():
    positions = sincos_positions(dim=16, grid=(3, 3))
    assert positions.dtype == torch.float32
    literal = torch.tensor([oracle.position(row, column, 16) for row in range(3) for column in range(3)])
    torch.testing.assert_close(positions[0], literal, rtol=0, atol=1e-7)


def test_the_first_half_of_a_position_is_its_column():
    positions = sincos_positions(dim=8, grid=(4, 4))[0].reshape(4, 4, 8)
    assert torch.equal(positions[1, :, :4], positions[3, :, :4])  # same columns, other row
    assert torch.equal(positions[:, 1, 4:], positions[:, 3, 4:])  # same rows, other column
    assert positions[0, 3, 0].item() == torch.tensor(math.sin(3.0)).item()


def test_frequencies_are_as_exact_as_float32_can_be():
    exact = [10000 ** (-k / 128) for k in range(128)]
    assert torch.equal(timestep_frequencies(256), torch.tensor(exact, dtype=torch.float64).float())


def test_unpatchify_orders_rows_columns_channels():
    grid, p, channels = 2, 3, 2
    tokens = torch.arange(grid * grid * p * p * channels).reshape(1, grid * grid, -1)
    image = unpatchify(tokens, (grid, grid), p)
    assert image.shape == (1, channels, 6, 6)
    for token in range(4):
        for row in range(p):
            for column in range(p):
                for channel in range(channels):
                    y, x = token // grid * p + row, token % grid * p + column
                    assert image[0, channel, y, x] == tokens[0, token, (row * p + column) * channels + channel]
