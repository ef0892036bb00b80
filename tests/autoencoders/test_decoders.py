"""A faster decoder for a run's latents gives the images of its own pipeline, or is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from repa.autoencoders import check_decoder, load_autoencoder, load_decoder
from repa.autoencoders.contract import Autoencoder
from repa.base.errors import UserError
from tests.autoencoders.folders import save_dc, save_kl, save_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Autoencoders with 4 channels at a quarter of the size; `other decoder` has `kl`'s encoder and another scale."""
    root = tmp_path_factory.mktemp("decoders")
    made = {
        "kl": save_kl(root / "kl", latent_channels=4, scaling_factor=0.25, shift_factor=0.5),
        "other decoder": save_kl(root / "decoder", latent_channels=4, scaling_factor=2.0, shift_factor=-0.25),
        "other encoder": save_kl(root / "encoder", seed=1, latent_channels=4, scaling_factor=0.25, shift_factor=0.5),
        "per channel": save_kl(root / "channels", latent_channels=4, latents_mean=[0.5] * 4, latents_std=[2, 3, 4, 5]),
        "tiny": save_tiny(root / "tiny"),
        "16 channels": save_tiny(root / "sixteen", latent_channels=16),
        "dc": save_dc(root / "dc", latent_channels=4, encoder_out_shortcut=False, decoder_in_shortcut=False),
    }
    path = made["other decoder"] / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({k: v + 0.01 if k.startswith(("decoder.", "post_quant")) else v for k, v in weights.items()}, path)
    return made


@pytest.fixture
def latents():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(4))


def pixels_of(images):
    return (127.5 * images + 127.5).clamp(0, 255)


def test_taesd_takes_the_scaled_latents(folders, latents, images):
    """AutoencoderTiny's scaling_factor is 1, so a pipeline passes it the network's output."""
    from diffusers import AutoencoderTiny

    autoencoder = load_autoencoder("sd-vae-ft-mse", weights=folders["kl"])
    fast = load_decoder("taesd", autoencoder, weights=folders["tiny"])
    tiny = AutoencoderTiny.from_pretrained(folders["tiny"], local_files_only=True, low_cpu_mem_usage=False)
    with torch.no_grad():
        expected = pixels_of(tiny.decode(latents).sample)
    decoded = fast.decode(latents)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (2, 3, 16, 24))
    assert (decoded.float() - expected).abs().max() < 0.51
    assert (decoded.float() - pixels_of(autoencoder.images(latents))).abs().max() > 2
    moments = autoencoder.encode(images)
    assert torch.equal(fast.encode(images), moments)
    assert torch.equal(
        fast.sample(moments, torch.Generator().manual_seed(0)),
        autoencoder.sample(moments, torch.Generator().manual_seed(0)),
    )
    assert fast.identity == autoencoder.identity
    assert isinstance(fast, Autoencoder)
    assert not any(p.requires_grad for p in fast.parameters())


def test_another_decoder_of_the_same_encoder_takes_the_unscaled_latents(folders, latents):
    """The two folders scale differently, so the latents are passed unscaled, as the encoder gave them."""
    autoencoder = load_autoencoder("kl", weights=folders["kl"])
    other = load_autoencoder("kl", weights=folders["other decoder"])
    decoded = load_decoder("kl", autoencoder, weights=folders["other decoder"]).decode(latents)
    z = latents / 0.25 + 0.5
    with torch.no_grad():
        expected = pixels_of(other.vae.decode(z).sample)
        own = pixels_of(autoencoder.vae.decode(z).sample)
    assert (decoded.float() - expected).abs().max() < 0.51
    assert (expected - own).abs().max() > 1


def test_sd_vae_mse_and_ema_share_a_latent_space(folders, latents):
    autoencoder = load_autoencoder("sd-vae-ft-mse", weights=folders["kl"])
    # these two are known to share a latent space
    ema = load_autoencoder("sd-vae-ft-ema", weights=folders["other encoder"])
    decoder = load_decoder("sd-vae-ft-ema", autoencoder, weights=folders["other encoder"])
    assert torch.equal(decoder.decode(latents), ema.decode(latents))


def test_the_full_decoder_decodes_latents_of_a_tiny_encoder(folders, latents):
    autoencoder = load_autoencoder("taesd", weights=folders["tiny"])
    full = load_autoencoder("sd-vae-ft-ema", weights=folders["kl"])
    decoder = load_decoder("sd-vae-ft-ema", autoencoder, weights=folders["kl"])
    assert torch.equal(decoder.decode(latents), full.decode(latents))
    assert (decoder.stochastic, full.stochastic) == (False, True)


@pytest.mark.parametrize(
    ("spec", "folder", "decoder", "decoder_folder", "message"),
    [
        ("sd-vae-ft-mse", "kl", "taesdxl", "tiny", "their latent spaces are sd and sdxl"),
        ("sd3-vae", "kl", "taef1", "tiny", "their latent spaces are sd3 and flux"),
        ("sd-vae-ft-mse", "kl", "taesd", "16 channels", "4 channels at 1/4 of the size do not match 16 at 1/4; choose"),
        ("kl", "kl", "kl", "other encoder", "their encoders differ"),
        ("kl", "kl", "dc-ae-f32", "dc", "their encoders differ"),
        ("kl", "per channel", "taesd", "tiny", "normalised per channel"),
    ],
)
def test_an_incompatible_decoder_is_refused(spec, folder, decoder, decoder_folder, message, folders):
    autoencoder = load_autoencoder(spec, weights=folders[folder])
    with pytest.raises(UserError, match=f"latents of {spec!r} cannot be decoded by {decoder!r}: .*{message}"):
        load_decoder(decoder, autoencoder, weights=folders[decoder_folder])


def test_a_decoder_with_another_factor_is_refused(folders, tmp_path):
    half = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    half |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    autoencoder = load_autoencoder("sd-vae-ft-mse", weights=folders["kl"])
    with pytest.raises(UserError, match="4 channels at 1/4 of the size do not match 4 at 1/2; choose"):
        load_decoder("taesd", autoencoder, weights=save_tiny(tmp_path, **half))
    with pytest.raises(UserError, match="'pixels'"):
        load_decoder("pixels", autoencoder)


def test_a_decoder_for_latents_of_unknown_space_is_accepted(folders, latents):
    autoencoder = load_autoencoder("kl", weights=folders["kl"])
    decoder = load_decoder("taesdxl", autoencoder, weights=folders["tiny"])
    assert torch.equal(decoder.decode(latents), load_autoencoder("taesdxl", weights=folders["tiny"]).decode(latents))


def test_a_copy_of_the_folder_is_the_same_latent_space(folders, tmp_path):
    copy = shutil.copytree(folders["per channel"], tmp_path / "copy")
    check_decoder(load_autoencoder("kl", weights=copy), load_autoencoder("kl", weights=folders["per channel"]))


def test_pixel_latents_decode_exactly():
    pixels = load_autoencoder("pixels")
    images = torch.randint(0, 256, (1, 3, 2, 3), dtype=torch.uint8)
    assert torch.equal(load_decoder("pixels", pixels).decode(pixels.sample(pixels.encode(images))), images)
