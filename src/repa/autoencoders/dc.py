"""Deep compression: AutoencoderDC of diffusers (Chen et al., arXiv 2410.10733), 32 pixels to a latent and no posterior."""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.autoencoders.contract import DeterministicAutoencoder
from repa.autoencoders.loading import load_diffusers


class DeepCompressionAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderDC: deterministic, so the standard deviation is 0."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        config = vae.config
        super().__init__(
            name,
            channels=config.latent_channels,
            factor=2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=0.0,
            space=space,
        )
        self.vae = vae

    def encoded(self, x: Tensor) -> Tensor:
        return self.vae.encode(x).latent


def dc_ae_f32(weights: str | Path | None) -> DeepCompressionAutoencoder:
    """DC-AE trained on ImageNet: 32 channels at a 32nd of the size; 512 pixels become 16 x 16 latents."""
    source = weights or "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    return DeepCompressionAutoencoder("dc-ae-f32", load_diffusers("AutoencoderDC", "dc-ae-f32", source), "dc-ae-f32")
