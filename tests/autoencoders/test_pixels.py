import pytest
import torch

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError


def test_every_grey_level_survives():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = torch.cat([levels, levels.flip(3), levels.transpose(2, 3)], dim=1)
    pixels = load_autoencoder("pixels")
    moments = pixels.encode(images)
    assert moments.shape == (1, 3, 16, 16)
    assert (moments[:, 0].min(), moments[:, 0].max()) == (-1, 1)
    latents = pixels.sample(moments)
    torch.testing.assert_close(latents, images / 127.5 - 1)
    assert torch.equal(pixels.decode(latents), images)


def test_decoding_rounds_to_the_nearest_level_and_clips():
    pixels = load_autoencoder("pixels")
    values = torch.tensor(
        [-3.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 99.49 / 127.5 - 1, 99.51 / 127.5 - 1, 1.0, 9.0]
    )
    levels = pixels.decode(values.expand(1, 3, 1, 8))
    assert levels[0, 0, 0].tolist() == [0, 0, 0, 1, 99, 100, 255, 255]


def test_pixels_need_no_weights_and_are_not_stored():
    pixels = load_autoencoder("pixels")
    assert not pixels.stores_moments
    assert pixels.identity == {"name": "pixels", "sha256": None, "scale": 1.0, "shift": 0.0, "stochastic": False}
    with pytest.raises(UserError, match="has no weights"):
        load_autoencoder("pixels", weights="somewhere")
