"""Parameters and FLOPs of autoencoders; those whose shape is known here without their weights."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from repa.autoencoders.contract import load_autoencoder
from repa.base import extras
from repa.base.cost import Cost, cost_of
from repa.base.errors import UserError

_LEVELS = (128, 256, 512, 512)
_KL: dict[str, Any] = {
    "block_out_channels": _LEVELS,
    "down_block_types": ("DownEncoderBlock2D",) * len(_LEVELS),
    "up_block_types": ("UpDecoderBlock2D",) * len(_LEVELS),
    "layers_per_block": 2,
}
_WIDE = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("sd-vae-ft-mse", "sd-vae-ft-ema", "sdxl-vae"), ("AutoencoderKL", {**_KL, "latent_channels": 4})),
    **dict.fromkeys(("sd3-vae", "flux-vae"), ("AutoencoderKL", _WIDE)),
    **dict.fromkeys(("taesd", "taesdxl"), ("AutoencoderTiny", {"latent_channels": 4})),
    **dict.fromkeys(("taesd3", "taef1"), ("AutoencoderTiny", {"latent_channels": 16})),
}
"""Name -> class of diffusers and its arguments."""
FACTOR = 8  # pixels per latent, of all of these


class AutoencoderCost(NamedTuple):
    """Of one image."""

    channels: int
    factor: int
    stores_moments: bool
    cost: Cost
    """Parameters of encoder and decoder, FLOPs of the encoder."""
    decoding: int
    """FLOPs of the decoder."""


def autoencoder_cost(spec: str, resolution: int, weights: str | Path | None = None) -> AutoencoderCost:
    """What encoding an image of `resolution` pixels costs, and decoding it.

    Raises:
        UserError: its shape is known from its weights alone, and they cannot be had.
    """
    pixels = torch.empty(1, 3, resolution, resolution, device="meta")
    if spec in SHAPES and weights is None:
        vae, channels = _outline(*SHAPES[spec])
        cost = cost_of(vae, lambda: vae.encoder(pixels))
        latents = torch.empty(1, channels, resolution // FACTOR, resolution // FACTOR, device="meta")
        return AutoencoderCost(channels, FACTOR, True, cost, cost_of(vae, lambda: vae.decoder(latents)).forward)
    autoencoder = load_autoencoder(spec, weights=weights).to("meta")
    if resolution % autoencoder.factor:
        raise UserError(
            f"resolution is {resolution}, but {spec} shrinks images {autoencoder.factor} times: choose a multiple."
        )
    cost = cost_of(autoencoder, lambda: autoencoder.moments(pixels)[0])
    side = resolution // autoencoder.factor
    latents = torch.empty(1, autoencoder.channels, side, side, device="meta")
    decoding = cost_of(autoencoder, lambda: autoencoder.images(latents)).forward
    return AutoencoderCost(autoencoder.channels, autoencoder.factor, autoencoder.stores_moments, cost, decoding)


def _outline(kind: str, arguments: dict[str, Any]) -> tuple[nn.Module, int]:
    """A model of diffusers on the meta device, and its latent channels."""
    diffusers = extras.need("diffusers", "The cost of an autoencoder")
    with torch.device("meta"):
        vae = getattr(diffusers, kind)(**arguments)
    return vae.requires_grad_(False), arguments["latent_channels"]
