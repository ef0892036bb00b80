import pytest
import torch

from repa.autoencoders import load_autoencoder


@pytest.mark.parametrize(("spec", "folder"), [("kl", "kl_folder"), ("pixels", None)])
def test_latents_can_be_sampled_after_the_networks_are_released(spec, folder, images, request):
    weights = request.getfixturevalue(folder) if folder else None
    autoencoder = load_autoencoder(spec, weights=weights)
    moments = autoencoder.encode(images)
    noise = torch.randn(moments.shape[0], autoencoder.channels, *moments.shape[2:])
    wanted = autoencoder.sample(moments, noise=noise)
    autoencoder.release_networks()
    assert list(autoencoder.parameters()) == []
    assert torch.equal(autoencoder.sample(moments, noise=noise), wanted)
