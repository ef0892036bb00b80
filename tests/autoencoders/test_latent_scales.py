"""Scale and shift come from the folder's config.json, in every form that diffusers defines."""

import json

import pytest
import torch

from repa.autoencoders import load_autoencoder
from repa.base.errors import UserError
from tests.autoencoders.folders import save_dc, save_kl, save_tiny

MEAN, STD = (-1.5, 0.25, 0.0, 3.0, -0.5), (8.0, 5.5, 0.5, 6.25, 1.0)  # one for each channel


def of(folder, **config):
    return load_autoencoder("kl", weights=save_kl(folder, **config))


@pytest.mark.parametrize("name", ["sd-vae-ft-mse", "sd-vae-ft-ema", "sdxl-vae", "sd3-vae", "flux-vae"])
def test_scales_come_from_the_folder_not_from_the_name(name, tmp_path):
    save_kl(tmp_path, scaling_factor=0.625, shift_factor=0.75, latent_channels=3)
    autoencoder = load_autoencoder(name, weights=tmp_path)
    assert (autoencoder.name, autoencoder.channels, autoencoder.factor) == (name, 3, 4)
    latents = autoencoder.sample(torch.ones(1, 6, 1, 1), noise=torch.zeros(1, 3, 1, 1))
    assert latents.flatten().tolist() == [0.25 * 0.625] * 3


@pytest.mark.parametrize(("name", "save"), [("dc-ae-f32", save_dc), *[(n, save_tiny) for n in ("taesd3", "taef1")]])
def test_scales_of_deterministic_autoencoders_come_from_the_folder(name, save, tmp_path):
    autoencoder = load_autoencoder(name, weights=save(tmp_path, scaling_factor=0.625, latent_channels=2))
    assert (autoencoder.scale, autoencoder.shift, autoencoder.channels) == (0.625, 0, 2)


def test_a_config_without_scale_uses_stable_diffusions(tmp_path):
    """The configs of sd-vae-ft-mse and -ema have none, so diffusers' default applies, as in every pipeline."""
    folder = save_kl(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    assert (load_autoencoder("kl", weights=folder).scale, load_autoencoder("kl", weights=folder).shift) == (0.18215, 0)


def test_latents_can_be_normalised_per_channel(tmp_path, images):
    autoencoder = of(tmp_path, scaling_factor=0.5, latents_mean=MEAN, latents_std=STD)
    moments = autoencoder.encode(images)
    noise = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(2))
    latents = autoencoder.sample(moments, noise=noise)
    for c in range(5):
        z = moments[:, c].double() + moments[:, 5 + c].double() * noise[:, c]
        torch.testing.assert_close(latents[:, c].double(), (z - MEAN[c]) * 0.5 / STD[c], atol=1e-5, rtol=1e-5)
    z = torch.stack([latents[:, c] * STD[c] / 0.5 + MEAN[c] for c in range(5)], dim=1)
    with torch.no_grad():
        pixels = (127.5 * autoencoder.vae.decode(z).sample + 127.5).clamp(0, 255)
    assert (autoencoder.decode(latents).float() - pixels).abs().max() < 0.51
    identity = autoencoder.identity
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["shift"], identity["scale"]) == (list(MEAN), [0.5 / std for std in STD])
    assert not [key for key in autoencoder.state_dict() if "scale" in key or "shift" in key]


def test_decoding_undoes_the_scale(tmp_path):
    for i, config in enumerate([{"shift_factor": -0.7}, {"latents_mean": MEAN, "latents_std": STD}]):
        autoencoder = of(tmp_path / str(i), scaling_factor=0.13025, **config)
        autoencoder.images = lambda z: z[:, :3]  # a decoder that returns the latents
        levels = torch.randint(0, 256, (2, 3, 4, 4), generator=torch.Generator().manual_seed(i))
        z = torch.cat([levels / 127.5 - 1, torch.zeros(2, 2, 4, 4)], dim=1)
        moments = torch.cat([z, torch.ones_like(z)], dim=1)
        assert torch.equal(autoencoder.decode(autoencoder.sample(moments, noise=torch.zeros_like(z))), levels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"latents_mean": MEAN}, "latents_mean and latents_std together"),
        ({"latents_std": STD}, "latents_mean and latents_std together"),
        ({"latents_mean": MEAN, "latents_std": STD, "shift_factor": 0.1}, "no shift_factor, but gives.* 0.1"),
        ({"latents_mean": MEAN[:4], "latents_std": STD[:4]}, "each of its 5 channels"),
        ({"latents_mean": MEAN, "latents_std": (0.0, *STD[1:])}, "a positive latents_std"),
    ],
)
def test_a_mean_without_a_deviation_is_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        of(tmp_path, **config)
