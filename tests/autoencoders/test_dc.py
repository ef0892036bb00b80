import torch

from repa.autoencoders import load_autoencoder


def test_latents_equal_those_of_diffusers_and_are_deterministic(dc_folder, images):
    from diffusers import AutoencoderDC

    autoencoder = load_autoencoder("dc-ae-f32", weights=dc_folder)
    vae = AutoencoderDC.from_pretrained(dc_folder, local_files_only=True, low_cpu_mem_usage=False)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stochastic) == (8, 4, False)
    with torch.no_grad():
        encoded = vae.encode(images.float() / 127.5 - 1).latent  # (2, 8, 4, 6)
        decoded = vae.decode(encoded).sample
    moments = autoencoder.encode(images)
    torch.testing.assert_close(moments, encoded)
    latents = autoencoder.sample(moments)
    torch.testing.assert_close(latents, encoded * 0.3189)
    assert torch.equal(autoencoder.sample(moments, torch.Generator().manual_seed(5)), latents)
    assert torch.equal(autoencoder.sample(moments, noise=torch.ones_like(latents)), latents)
    pixels = (127.5 * decoded + 127.5).clamp(0, 255)
    assert decoded.shape == (2, 3, 16, 24)
    assert (autoencoder.decode(latents).float() - pixels).abs().max() < 0.51


def test_the_identity_depends_on_the_encoder_only(dc_folder):
    autoencoder = load_autoencoder("dc-ae-f32", weights=dc_folder)
    assert (autoencoder.identity["name"], autoencoder.identity["scale"]) == ("dc-ae-f32", 0.3189)
    weights = autoencoder.encoder_weights()
    assert set(weights) == {key for key in autoencoder.vae.state_dict() if not key.startswith("decoder.")}


def test_the_published_shape_has_factor_32():
    """mit-han-lab's configuration (diffusers' defaults) halves the size five times; built on the meta device."""
    from diffusers import AutoencoderDC

    from repa.autoencoders.released import DeterministicAutoencoder

    with torch.device("meta"):
        autoencoder = DeterministicAutoencoder("dc-ae-f32", AutoencoderDC(scaling_factor=0.3189))
        assert (autoencoder.channels, autoencoder.factor) == (32, 32)
        mean, std = autoencoder.moments(torch.zeros(1, 3, 512, 256))
        assert mean.shape == std.shape == (1, 32, 16, 8)
        assert autoencoder.images(mean).shape == (1, 3, 512, 256)
