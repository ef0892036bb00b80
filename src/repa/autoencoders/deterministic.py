"""Autoencoders of diffusers without a posterior: AutoencoderDC, AutoencoderTiny and AutoencoderRAE.

* Deep compression (Chen et al., arXiv 2410.10733): 32 pixels to a latent.
* TAESD: small and fast, distilled from a larger autoencoder, whose place it takes.
* Representation autoencoders (Zheng et al., arXiv 2510.11690): the latents are the tokens of a frozen encoder, one a patch,
  normalised by the mean and deviation of each channel at each place. These statistics lie in the weights, and so do the encoder,
  the decoder and the one image size that they are made for.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.autoencoders.contract import Autoencoder
from repa.autoencoders.loading import load_diffusers
from repa.base.errors import UserError

STATISTICS = ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std")  # what a RAE's encoder does not tell


class DeterministicAutoencoder(Autoencoder):
    """One of diffusers' without a posterior: its encoder gives the latents at once, and the standard deviation is 0."""

    stochastic = False

    def __init__(self, name: str, vae: Any, space: str = "", *, channels: int = 0, factor: int = 0):
        config = vae.config
        super().__init__(
            name, channels=channels or config.latent_channels, factor=factor or 2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor, shift=config.get("shift_factor") or 0.0, space=space,
        )  # fmt: skip
        self.vae = vae

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # By place: diffusers calls the one field `latent` in one class and `latents` in another.
        mean = self.vae.encode(x)[0]
        return mean, torch.zeros_like(mean)

    def images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def encoder_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.vae.state_dict().items() if k.startswith("encoder.")}


def dc_ae_f32(weights: str | Path | None) -> DeterministicAutoencoder:
    """DC-AE trained on ImageNet: 32 channels at a 32nd of the size; 512 pixels become 16 x 16 latents."""
    source = weights or "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"
    return DeterministicAutoencoder("dc-ae-f32", load_diffusers("AutoencoderDC", "dc-ae-f32", source), "dc-ae-f32")


class TinyAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderTiny, which gives the scaled latents that the larger autoencoder gives."""

    distilled = True


def taesd(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sd-vae-ft-mse and sd-vae-ft-ema."""
    return _taesd("taesd", weights, space="sd")


def taesdxl(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sdxl-vae."""
    return _taesd("taesdxl", weights, space="sdxl")


def taesd3(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of sd3-vae."""
    return _taesd("taesd3", weights, space="sd3")


def taef1(weights: str | Path | None) -> TinyAutoencoder:
    """Small and fast, for the latents of flux-vae."""
    return _taesd("taef1", weights, space="flux")


def _taesd(name: str, weights: str | Path | None, space: str) -> TinyAutoencoder:
    source = weights or f"madebyollin/{name}"
    return TinyAutoencoder(name, load_diffusers("AutoencoderTiny", name, source), space)


class RepresentationAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderRAE; it works on pixels in [0, 1]. Latents come normalised, so scale and shift are its own."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        super().__init__(name, vae, space, channels=vae.config.encoder_hidden_size, factor=vae.config.patch_size)
        self.resolution = vae.decoder_image_size
        # diffusers would multiply by the scale too, and the contract does: there it is set to 1.
        vae.register_to_config(scaling_factor=1.0)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().moments((x + 1) / 2)

    def images(self, z: Tensor) -> Tensor:
        return 2 * super().images(z) - 1

    def encoder_weights(self) -> dict[str, Tensor]:
        state = self.vae.state_dict()
        return {k: v for k, v in state.items() if k.startswith("encoder.") or k in STATISTICS}


def rae_dinov2_b(weights: str | Path | None) -> RepresentationAutoencoder:
    """The representation autoencoder of DINOv2-B with registers: 768 channels at a 16th of the size, 16 x 16 of images of 256 pixels."""
    return _rae("rae-dinov2-b", weights or "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", space="rae-dinov2-b")


def rae(weights: str | Path | None, *, hub: str = "") -> RepresentationAutoencoder:
    """Any other AutoencoderRAE, by its name on the hub or from a folder.

    Args:
        hub: owner/name of its repository.
    """
    if not (weights or hub):
        raise UserError(
            "The autoencoder 'rae' needs weights: a folder that diffusers saved, or a name on the hub as in 'rae:hub=owner/name'."
        )
    return _rae(f"rae:hub={hub}" if hub else "rae", weights or hub)


def _rae(name: str, source: str | Path, space: str = "") -> RepresentationAutoencoder:
    vae = load_diffusers("AutoencoderRAE", name, source)
    if not isinstance(vae.config.scaling_factor, (int, float)):
        raise UserError(f"{source} has the scaling_factor {vae.config.scaling_factor!r:.80}, which is not a number.")
    return RepresentationAutoencoder(name, vae, space)
