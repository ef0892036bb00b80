"""Faster decoding for previews: the decoder of another autoencoder of the same latent space."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repa.autoencoders.contract import Autoencoder, load_autoencoder
from repa.base.errors import UserError


class DecodedBy(Autoencoder):
    """Encodes and scales like `autoencoder` and decodes with `decoder`; a replacement for `autoencoder`."""

    def __init__(self, autoencoder: Autoencoder, decoder: Autoencoder):
        check_decoder(decoder, autoencoder)
        super().__init__(
            autoencoder.name, channels=autoencoder.channels, factor=autoencoder.factor, scale=autoencoder.scale,
            shift=autoencoder.shift, space=autoencoder.space,
        )  # fmt: skip
        self.stochastic, self.stores_moments = autoencoder.stochastic, autoencoder.stores_moments
        self.distilled, self.resolution = autoencoder.distilled, autoencoder.resolution
        self.autoencoder, self.decoder = autoencoder, decoder
        self.to(autoencoder._scale.device)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.autoencoder.moments(x)

    def encoder_weights(self) -> Mapping[str, Tensor]:
        return self.autoencoder.encoder_weights()

    def images(self, z: Tensor) -> Tensor:
        return self.decoder.images(z)

    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scaled latents of `autoencoder` (N, C, h, w) -> uint8 images (N, 3, H, W).

        A distilled decoder shares the scaled latents, so its own scale applies; otherwise the two share the unscaled
        latents, and their scales may differ.
        """
        if self.decoder.distilled or self.autoencoder.distilled:
            return self.decoder.decode(latents, dtype)
        return super().decode(latents, dtype)


def load_decoder(
    spec: str, autoencoder: Autoencoder, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """`autoencoder` with the decoder of `spec`, for example "taesd" if "sd-vae-ft-ema" is too slow.

    Args:
        spec, weights, device: as for `load_autoencoder`.
        autoencoder: the autoencoder of the scaled latents, on the same device.

    Raises:
        UserError: as `load_autoencoder` and `check_decoder`.
    """
    decoder = load_autoencoder(spec, weights=weights, device=device)
    return DecodedBy(autoencoder, decoder).eval().requires_grad_(False)


def check_decoder(decoder: Autoencoder, autoencoder: Autoencoder) -> None:
    """Check that `decoder` can decode the latents of `autoencoder`: same shape and, if known, same latent space.

    Raises:
        UserError: the shapes or the known spaces differ; per-channel normalisation with a distilled decoder, which does not
            support it; two autoencoders of unknown space with different encoders. A distilled decoder for an autoencoder
            of unknown space is accepted.
    """
    names = f"The latents of {autoencoder.name!r} cannot be decoded by {decoder.name!r}"
    if (decoder.channels, decoder.factor) != (autoencoder.channels, autoencoder.factor):
        raise UserError(
            f"{names}: {autoencoder.channels} channels at 1/{autoencoder.factor} of the size do not match {decoder.channels} "
            f"at 1/{decoder.factor}; choose a decoder of the same latents."
        )
    # An empty name means an unknown space.
    known = decoder.space and autoencoder.space
    if known and decoder.space != autoencoder.space:
        raise UserError(
            f"{names}: their latent spaces are {autoencoder.space} and {decoder.space}; choose a decoder of the "
            "same latent space."
        )
    distilled = decoder.distilled or autoencoder.distilled
    if distilled and not (isinstance(autoencoder.scale, float | int) and isinstance(decoder.scale, float | int)):
        raise UserError(
            f"{names}: one is normalised per channel, but a distilled one needs a single scale; choose a decoder "
            "that is not distilled."
        )
    if not (distilled or known) and decoder.identity["sha256"] != autoencoder.identity["sha256"]:
        raise UserError(
            f"{names}: their encoders differ, so they may have different latent spaces; choose a decoder that "
            "was trained for the same encoder."
        )
