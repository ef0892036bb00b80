import torch

from repa.autoencoders import load_autoencoder


def test_latents_are_deterministic_and_round_trip_through_the_scale(tiny_folder, images):
    from diffusers import AutoencoderTiny

    autoencoder = load_autoencoder("taesd", weights=tiny_folder)
    vae = AutoencoderTiny.from_pretrained(tiny_folder, local_files_only=True, low_cpu_mem_usage=False)
    assert (autoencoder.channels, autoencoder.factor, autoencoder.stores_moments) == (4, 4, True)
    with torch.no_grad():
        encoded = vae.encode(images.float() / 127.5 - 1).latents
        decoded = vae.decode(encoded).sample
    moments = autoencoder.encode(images)
    torch.testing.assert_close(moments, encoded)  # no half of zeros
    latents = autoencoder.sample(moments)
    torch.testing.assert_close(latents, encoded * 1.5)
    assert torch.equal(autoencoder.sample(moments, torch.Generator().manual_seed(5)), latents)
    expected = (127.5 * decoded + 127.5).clamp(0, 255)
    assert (autoencoder.decode(latents).float() - expected).abs().max() < 0.51
    assert len(autoencoder.identity["sha256"]) == 64
