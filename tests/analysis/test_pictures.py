"""Colours of tokens: their principal components, deterministic in sign and scale."""

import numpy as np
import pytest
import torch

from repa.analysis import principal_colours
from repa.analysis.blocks import colour_pictures, tokens_of_run
from repa.base.errors import UserError
from repa.base.rng import SampleStreams


def tokens(num=3, length=16, dim=8):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(num, length, dim, generator=g) * torch.tensor([9.0, 5, 2.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    return x @ torch.linalg.qr(torch.randn(dim, dim, generator=g))[0] + 7


def test_colours_are_the_first_three_principal_components():
    x = tokens()
    flat = x.flatten(0, 1).double()
    left = np.linalg.svd((flat - flat.mean(0)).numpy(), full_matrices=False)[0]
    colours = principal_colours(x).flatten(0, 1).double().numpy()
    for c in range(3):
        inside = (colours[:, c] > 0) & (colours[:, c] < 1)  # not clipped at the quantiles
        assert inside.sum() > 40
        assert abs(np.corrcoef(colours[inside, c], left[inside, c])[0, 1]) > 1 - 1e-6
    assert colours.min() == 0
    assert colours.max() == 1


def test_the_sign_is_fixed_and_all_images_share_one_scale():
    x = tokens()
    assert torch.allclose(principal_colours(x), principal_colours(x * 3 - 5), atol=1e-5)
    assert torch.allclose(principal_colours(x)[[2, 0, 1]], principal_colours(x[[2, 0, 1]]), atol=1e-5)
    one = principal_colours(x[:1])
    assert not torch.allclose(one, principal_colours(x)[:1], atol=1e-2)


def test_tokens_become_squares_in_row_major_order():
    """Brightness grows along the flat token index, so it must grow from left to right and from top to bottom."""
    x = torch.zeros(1, 16, 3)
    x[0, :, 0] = torch.arange(16.0)
    picture = colour_pictures(x, 8)
    assert picture.shape == (1, 8, 8, 3)
    red = picture[0, ::2, ::2, :].max(-1).flatten().astype(int)
    assert (np.diff(red) >= 0).all() or (np.diff(red) <= 0).all()
    assert len(set(red)) > 10
    assert (picture[0, 0:2, 0:2] == picture[0, 0, 0]).all()


def test_tokens_of_a_run_use_the_noise_of_each_image(run, data):
    indices = np.array([4, 30])
    images = torch.from_numpy(data.gather("images", indices)).float() / 127.5 - 1
    noise = SampleStreams(3, [4, 30]).randn(3, 16, 16)
    got = tokens_of_run(run, data, indices, (1,), 0.25, seed=3)
    expected = (0.75 * images + 0.25 * noise).flatten(2).transpose(1, 2)
    assert torch.allclose(got[1], expected, atol=1e-6)
    with pytest.raises(UserError, match="no block 9"):
        tokens_of_run(run, data, indices, (9,), 0.25, seed=3)


def test_invalid_input_is_refused():
    with pytest.raises(UserError, match="4 finite tokens of 3 channels, but got 16 of 2"):
        principal_colours(torch.zeros(1, 16, 2))
    with pytest.raises(UserError, match="finite"):
        principal_colours(torch.full((1, 16, 4), torch.nan))
    assert (principal_colours(torch.ones(2, 4, 5)) == 0).all()  # equal tokens have one colour
