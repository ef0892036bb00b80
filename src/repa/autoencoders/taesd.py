"""TAESD: small, fast, deterministic stand-ins for larger autoencoders (AutoencoderTiny of diffusers)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.autoencoders.contract import DeterministicAutoencoder
from repa.autoencoders.loading import load_diffusers


class TinyAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderTiny: its encoder gives the latents of models at once, so the standard deviation is 0."""

    distilled = True

    def __init__(self, name: str, vae: Any, space: str = ""):
        config = vae.config
        super().__init__(
            name,
            channels=config.latent_channels,
            factor=2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor,
            space=space,
        )
        self.vae = vae

    def encoded(self, x: Tensor) -> Tensor:
        return self.vae.encode(x).latents


def taesd(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sd-vae-ft-mse and sd-vae-ft-ema."""
    return _load("taesd", weights, space="sd")


def taesdxl(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sdxl-vae."""
    return _load("taesdxl", weights, space="sdxl")


def taesd3(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sd3-vae."""
    return _load("taesd3", weights, space="sd3")


def taef1(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of flux-vae."""
    return _load("taef1", weights, space="flux")


def _load(name: str, weights: str | Path | None, space: str) -> TinyAutoencoder:
    source = weights or f"madebyollin/{name}"
    return TinyAutoencoder(name, load_diffusers("AutoencoderTiny", name, source), space)
