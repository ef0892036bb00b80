import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from repa.models.layers import PatchEmbedding, sincos_positions, timestep_frequencies, unpatchify
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


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
def test_where_patches_overlap_a_pixel_is_the_sum_of_what_they_say(grid):
    p, overlap, channels = 3, 2, 2
    q = p + 2 * overlap
    tokens = torch.randn(1, grid[0] * grid[1], q * q * channels, dtype=torch.float64)
    image = unpatchify(tokens, grid, p, overlap)
    expected = torch.zeros(channels, grid[0] * p, grid[1] * p, dtype=torch.float64)
    for token, row, column, channel in itertools.product(range(grid[0] * grid[1]), range(q), range(q), range(channels)):
        y, x = token // grid[1] * p + row - overlap, token % grid[1] * p + column - overlap
        if 0 <= y < grid[0] * p and 0 <= x < grid[1] * p:
            expected[channel, y, x] += tokens[0, token, (row * q + column) * channels + channel]
    torch.testing.assert_close(image[0], expected)


def test_a_patch_sees_its_neighbours_pixels():
    embed = PatchEmbedding(1, 4, 2, overlap=1).double()
    image = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    tokens = embed(image)
    padded = F.pad(image, (1, 1, 1, 1))
    for token in range(6):
        y, x = token // 3 * 2, token % 3 * 2
        expected = (embed.proj.weight * padded[0, :, y : y + 4, x : x + 4]).sum((1, 2, 3)) + embed.proj.bias
        torch.testing.assert_close(tokens[0, token], expected)
