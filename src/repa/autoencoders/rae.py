"""Representation autoencoders (Zheng et al., arXiv 2510.11690): AutoencoderRAE of diffusers, a frozen encoder and its decoder.

The latents are the encoder's own tokens, one a patch, normalised by the mean and deviation of each channel at each place; these
statistics lie in the weights, and so do the encoder, the decoder and the one image size that they are made for.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.autoencoders.contract import DeterministicAutoencoder
from repa.autoencoders.loading import load_diffusers
from repa.base.errors import UserError

STATISTICS = ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std")  # what its encoder's weights do not tell


class RepresentationAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderRAE; it works on pixels in [0, 1]. Latents come normalised, so scale and shift are its own."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        config = vae.config
        super().__init__(
            name,
            channels=config.encoder_hidden_size,
            factor=config.patch_size,
            scale=config.scaling_factor,
            shift=0.0,
            space=space,
        )
        self.vae, self.resolution = vae, vae.decoder_image_size
        # diffusers would multiply by the scale too, and the contract does: there it is set to 1.
        vae.register_to_config(scaling_factor=1.0)

    def encoded(self, x: Tensor) -> Tensor:
        return self.vae.encode((x + 1) / 2).latent

    def images(self, z: Tensor) -> Tensor:
        return 2 * super().images(z) - 1

    def encoder_weights(self) -> dict[str, Tensor]:
        state = self.vae.state_dict()
        return {k: v for k, v in state.items() if k.startswith("encoder.") or k in STATISTICS}


def rae_dinov2_b(weights: str | Path | None) -> RepresentationAutoencoder:
    """The representation autoencoder of DINOv2-B with registers: 768 channels at a 16th of the size, 16 x 16 of images of 256 pixels."""
    return _load("rae-dinov2-b", weights or "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", space="rae-dinov2-b")


def rae(weights: str | Path | None, *, hub: str = "") -> RepresentationAutoencoder:
    """Any other AutoencoderRAE, by its name on the hub or from a folder.

    Args:
        hub: owner/name of its repository.
    """
    if not (weights or hub):
        raise UserError(
            "The autoencoder 'rae' needs weights: a folder that diffusers saved, or a name on the hub as in 'rae:hub=owner/name'."
        )
    return _load(f"rae:hub={hub}" if hub else "rae", weights or hub)


def _load(name: str, source: str | Path, space: str = "") -> RepresentationAutoencoder:
    vae = load_diffusers("AutoencoderRAE", name, source)
    if not isinstance(vae.config.scaling_factor, (int, float)):
        raise UserError(f"{source} has the scaling_factor {vae.config.scaling_factor!r:.80}, which is not a number.")
    return RepresentationAutoencoder(name, vae, space)
