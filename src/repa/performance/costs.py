"""Parameters and FLOPs of encoders and autoencoders, without their weights if their shape is known here."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from repa.autoencoders import RELEASED
from repa.autoencoders.contract import Autoencoder, load_autoencoder
from repa.autoencoders.released import CLASSES
from repa.base import imports
from repa.encoders.contract import VisionEncoder
from repa.encoders.families import SIZES, encoder_names, family_of
from repa.encoders.loading import canonical, load_encoder
from repa.encoders.vit import ViTEncoder
from repa.models.cost import Cost, cost_of

_LEVELS = (128, 256, 512, 512)
_KL: dict[str, Any] = {
    "block_out_channels": _LEVELS,
    "down_block_types": ("DownEncoderBlock2D",) * len(_LEVELS),
    "up_block_types": ("UpDecoderBlock2D",) * len(_LEVELS),
    "layers_per_block": 2,
}
_SD = {**_KL, "latent_channels": 4}
_WIDE = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_DEEP: dict[str, Any] = {  # 69.8 million parameters
    "block_out_channels": (128, 128, 256, 256, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
    "up_block_types": ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 32,
}
_VIT_XL = {"decoder_hidden_size": 1152, "decoder_num_hidden_layers": 28, "decoder_intermediate_size": 4096}


class EncoderCost(NamedTuple):
    """Of one image."""

    dim: int
    """Width of the tokens."""
    cost: Cost


def encoder_cost(spec: str, grid: int, weights: str | Path | None = None) -> EncoderCost:
    """Cost of an encoder on a token grid of side `grid`.

    An encoder that is not in the table of vision transformers is loaded.

    Raises:
        UserError: the encoder cannot be loaded.
    """
    spec = canonical(spec)
    encoder = _encoder_outline(spec, grid) if spec in encoder_names() else load_encoder(spec, weights=weights)
    encoder, side = encoder.to("meta"), grid * encoder.patch_size  # on the meta device only shapes are computed
    pixels = torch.empty(1, 3, side, side, device="meta", dtype=next(encoder.net.parameters()).dtype)
    return EncoderCost(encoder.dim, cost_of(encoder.net, lambda: encoder.extract(pixels, grid).patches))


def _encoder_outline(spec: str, grid: int) -> VisionEncoder:
    """An encoder of the table on the meta device."""
    transformers = imports.need("transformers", f"The cost of the encoder {spec}")
    family, size = family_of(spec)
    dim, depth, heads = SIZES[size]
    settings: dict[str, Any] = {
        "hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * dim,
        "patch_size": family.patch, "image_size": grid * family.patch, "num_register_tokens": family.registers,
        "use_swiglu_ffn": size == "g", **family.settings,
    }  # fmt: skip
    network = getattr(transformers, family.model)
    with torch.device("meta"):
        net = network(network.config_class(**settings), **family.build)
    return ViTEncoder(net, family, spec, Path(spec))


# Arguments of the diffusers classes of released autoencoders, from their config.json.
SHAPES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("sd-vae-ft-mse", "sd-vae-ft-ema", "sdxl-vae"), _SD),
    **dict.fromkeys(("sd3-vae", "flux-vae"), _WIDE),
    **{name: {"latent_channels": 4} for name in ("taesd", "taesdxl")},
    **{name: {"latent_channels": 16} for name in ("taesd3", "taef1")},
    **dict.fromkeys(("va-vae", "e2e-va-vae"), _DEEP),
    "rae-dinov2-b": _VIT_XL,
}


class AutoencoderCost(NamedTuple):
    """Of one image."""

    channels: int
    factor: int
    stores_moments: bool
    stored_channels: int
    cost: Cost
    """Parameters of encoder and decoder, FLOPs of the encoder."""
    decoding: int
    """FLOPs of the decoder."""


@functools.cache  # a comparison of networks needs the same autoencoder repeatedly
def autoencoder_cost(spec: str, resolution: int, weights: str | Path | None = None) -> AutoencoderCost:
    """Cost of encoding and decoding an image of `resolution` pixels.

    Raises:
        UserError: the autoencoder does not support the resolution, or its shape needs its weights and they are not available.
    """
    autoencoder = autoencoder_outline(spec, weights)
    autoencoder.check_resolution(resolution, resolution)
    side = resolution // autoencoder.factor
    pixels = torch.empty(1, 3, resolution, resolution, device="meta")
    latents = torch.empty(1, autoencoder.channels, side, side, device="meta")
    cost = cost_of(autoencoder, lambda: autoencoder.moments(pixels)[0])
    decoding = cost_of(autoencoder, lambda: autoencoder.images(latents)).forward
    stores, stored = autoencoder.stores_moments, autoencoder.stored_channels
    return AutoencoderCost(autoencoder.channels, autoencoder.factor, stores, stored, cost, decoding)


@functools.cache
def autoencoder_outline(spec: str, weights: str | Path | None = None) -> Autoencoder:
    """An autoencoder on the meta device; a released one is built without its weights."""
    if spec not in SHAPES or weights is not None:
        return load_autoencoder(spec, weights=weights).to("meta")
    diffusers = imports.need("diffusers", "The cost of an autoencoder")
    kind = RELEASED[spec].kind
    with torch.device("meta"):
        return CLASSES[kind](spec, getattr(diffusers, kind)(**SHAPES[spec])).requires_grad_(False)
