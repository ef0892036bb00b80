import json

import pytest
import torch

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.performance.costs import autoencoder_cost
from tests.autoencoders.folders import save_rae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_rae(tmp_path_factory.mktemp("rae"), scaling_factor=0.5)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_latents_are_tokens_normalised_per_position(folder, images):
    """The encoder's output for pixels in [0, 1], normalised by mean and deviation per channel and position."""
    autoencoder = load_autoencoder("rae", weights=folder)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.resolution) == (64, 8, 32)
    vae = autoencoder.vae
    pixels = torch.nn.functional.interpolate(images / 255, (56, 56), mode="bicubic", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        # (2, 16, 64)
        tokens = vae.encoder((pixels - mean[:, None, None]) / std[:, None, None]).last_hidden_state[:, 5:]
        z = (tokens.mT.reshape(2, 64, 4, 4) - vae._latents_mean) / (vae._latents_std + 1e-5)
    latents = autoencoder.sample(autoencoder.encode(images))
    torch.testing.assert_close(latents, 0.5 * z, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        decoded = vae.decode(latents / 0.5).sample
    found = autoencoder.decode(latents)
    assert found.shape == (2, 3, 32, 32)
    assert (found.float() - 255 * decoded.clamp(0, 1)).abs().max() < 0.51


def test_the_statistics_are_part_of_the_identity(folder, tmp_path):
    own = load_autoencoder("rae", weights=folder).identity
    assert own["stochastic"] is False
    assert own == load_autoencoder("rae", weights=save_rae(tmp_path / "same", scaling_factor=0.5)).identity
    other = save_rae(tmp_path / "other", scaling_factor=0.5, latents_mean=torch.zeros(64, 4, 4))
    assert own["sha256"] != load_autoencoder("rae", weights=other).identity["sha256"]


def test_the_published_shape_has_the_papers_tokens_and_time_shift():
    """DINOv2-B gives 16 x 16 tokens of width 768, for which the time shift is 6.93."""
    found = autoencoder_cost("rae-dinov2-b", 256)
    assert (found.channels, found.factor, found.stored_channels) == (768, 16, 768)
    assert DiffusionConfig(shift="auto").for_latents((768, 16, 16)).shift == pytest.approx(6.928203230275509)


def test_invalid_input_is_refused(folder):
    with pytest.raises(UserError, match="'rae' needs weights"):
        load_autoencoder("rae")
    autoencoder = load_autoencoder("rae", weights=folder)
    with pytest.raises(UserError, match="accepts only images of 32 x 32, but got 64 x 64"):
        autoencoder.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize(
    "lie",
    [
        {"scaling_factor": "x"}, {"encoder_num_hidden_layers": "x"}, {"encoder_num_hidden_layers": 2**31}, {"patch_size": 0},
        {"encoder_hidden_size": 2**17},
        {"encoder_norm_mean": "x"}, {"encoder_hidden_size": -1}, {"quantization_config": {"quant_method": "x"}},
    ],
)  # fmt: skip
def test_a_wrong_configuration_gives_a_one_line_error(lie, tmp_path):
    save_rae(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **lie}))
    with pytest.raises(UserError):
        load_autoencoder("rae", weights=tmp_path)
