import pytest
import torch

from repa.alignment import TOKEN_NORMS, resize_tokens
from repa.alignment.losses import grid_side
from repa.base.errors import UserError
from tests.oracles import alignment as oracle


@pytest.mark.parametrize(
    ("old", "new", "reference"),
    [((6, 6), (2, 2), oracle.area), ((8, 8), (2, 2), oracle.area), ((3, 3), (5, 5), oracle.bilinear),
     ((2, 2), (4, 4), oracle.bilinear), ((4, 16), (2, 8), oracle.area), ((2, 8), (3, 12), oracle.bilinear)],
)  # fmt: skip
def test_resize_equals_the_loops(old, new, reference):
    tokens = torch.randn(2, old[0] * old[1], 3, generator=torch.Generator().manual_seed(0))
    square = new[0] == new[1]
    got = resize_tokens(tokens, new[0] * new[1], None if square else new)
    assert got.shape == (2, new[0] * new[1], 3)
    for n in range(2):
        for channel in range(3):
            expected = torch.tensor(reference(tokens[n, :, channel].view(old).tolist(), *new))
            assert torch.allclose(got[n, :, channel].view(new), expected, atol=1e-5)


def test_a_square_on_a_long_grid_is_averaged_over_rows_and_interpolated_over_columns():
    tokens = torch.randn(1, 36, 1, generator=torch.Generator().manual_seed(0))
    got = resize_tokens(tokens, 24, (2, 12), (6, 6)).view(2, 12)
    expected = oracle.bilinear(oracle.area(tokens.view(6, 6).tolist(), 2, 6), 2, 12)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_resize_keeps_rows_and_columns_apart():
    rows = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)
    assert resize_tokens(rows, 4).flatten().tolist() == [0.5, 0.5, 2.5, 2.5]


def test_resize_to_the_same_grid_returns_the_tensor():
    tokens = torch.randn(1, 5, 2)  # not square, but unchanged
    assert resize_tokens(tokens, 5) is tokens


@pytest.mark.parametrize(("old", "new"), [(17, 16), (16, 17), (0, 4)])
def test_resize_refuses_tokens_without_a_square_grid(old, new):
    with pytest.raises(UserError, match="square grid"):
        resize_tokens(torch.zeros(1, old, 2), new)


def test_the_grid_side_is_the_root_of_the_number_of_tokens():
    assert [grid_side(n) for n in (1, 4, 256, 1024)] == [1, 2, 16, 32]


def test_zscore_matches_values_computed_by_hand():
    """Channel 0 of image 0 has mean 3 and unbiased std sqrt(20 / 3); image 1 is constant, and eps keeps it finite."""
    tokens = torch.tensor([[0.0, 2.0, 4.0, 6.0], [5.0, 5.0, 5.0, 5.0]])[..., None]
    got = TOKEN_NORMS.build("zscore:alpha=0.6")(tokens)[..., 0]
    std = (20 / 3) ** 0.5 + 1e-6
    assert torch.allclose(got[0], torch.tensor([(y - 0.6 * 3) / std for y in (0, 2, 4, 6)]))
    assert torch.allclose(got[1], torch.full((4,), 0.4 * 5 / 1e-6), rtol=1e-4)


def test_zscore_is_per_image_and_channel():
    tokens = torch.randn(2, 9, 3) * torch.tensor([1.0, 5.0, 100.0]) + torch.tensor([[[3.0]], [[-8.0]]])
    got = TOKEN_NORMS.build("zscore:alpha=1.0")(tokens)
    assert torch.allclose(got.mean(1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(got.var(1), torch.ones(2, 3), atol=1e-4)


def test_none_changes_nothing():
    tokens = torch.randn(2, 9, 3)
    assert TOKEN_NORMS.build("none")(tokens) is tokens


def test_zscore_refuses_a_single_token_and_a_non_numeric_alpha():
    with pytest.raises(UserError, match="at least 2 tokens"):
        TOKEN_NORMS.build("zscore")(torch.zeros(1, 1, 2))
    with pytest.raises(UserError, match="alpha"):
        TOKEN_NORMS.build("zscore:alpha=much")(torch.zeros(1, 4, 2))


def test_layernorm_is_over_the_channels_of_a_token():
    tokens = torch.tensor([[[1.0, 3.0], [10.0, 30.0]]], dtype=torch.float64)
    found = TOKEN_NORMS.build("layernorm")(tokens)
    torch.testing.assert_close(
        found, torch.tensor([[[-1.0, 1.0], [-1.0, 1.0]]], dtype=torch.float64), rtol=1e-4, atol=0
    )
