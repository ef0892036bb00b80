"""TAESD: a small, fast, deterministic stand-in for Stable Diffusion's autoencoder (AutoencoderTiny of diffusers)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.autoencoders.contract import Autoencoder
from repa.autoencoders.kl import load_diffusers


class TinyAutoencoder(Autoencoder):
    """A diffusers AutoencoderTiny: its encoder gives the latents of models at once, so the standard deviation is 0."""

    stochastic = False

    def __init__(self, name: str, vae: Any):
        config = vae.config
        super().__init__(
            name,
            channels=config.latent_channels,
            factor=2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor,
        )
        self.vae = vae

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.encode(x).latents
        return mean, torch.zeros_like(mean)

    def images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def encoder_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.vae.state_dict().items() if k.startswith("encoder.")}


def taesd(weights: str | Path | None) -> TinyAutoencoder:
    """The spec "taesd"."""
    return TinyAutoencoder("taesd", load_diffusers("AutoencoderTiny", "taesd", weights or "madebyollin/taesd"))
