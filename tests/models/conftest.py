import pytest
import torch

from repa.models import DiT


@pytest.fixture
def random_dit():
    """A tiny DiT without zero parameters, because the zero initialisation would hide errors."""

    def build(seed=0, **arguments):
        latent = {"latent_size": 6, "latent_channels": 3, "patch_size": 2, "num_classes": 5}
        model = DiT(**{**latent, "hidden_dim": 24, "depth": 3, "num_heads": 2, **arguments})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    return build
