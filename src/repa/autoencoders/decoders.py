"""Previews decoded faster: the latents of one autoencoder through the decoder of another of the same latent space."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from repa.autoencoders.contract import Autoencoder, load_autoencoder
from repa.base.errors import UserError


class DecodedBy(Autoencoder):
    """Encodes and scales as `autoencoder`, and decodes with `decoder`: stands wherever `autoencoder` stood."""

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

        A distilled autoencoder shares the scaled latents, so its own scale applies; two others share the unscaled ones,
        whatever scale each of them was given.
        """
        if self.decoder.distilled or self.autoencoder.distilled:
            return self.decoder.decode(latents, dtype)
        return super().decode(latents, dtype)


def load_decoder(
    spec: str, autoencoder: Autoencoder, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """`autoencoder` with the decoder of the one that `spec` names, for example "taesd" where "sd-vae-ft-ema" is too slow.

    Args:
        spec, weights, device: as for `load_autoencoder`.
        autoencoder: the one whose scaled latents are to be decoded, on the same device.

    Raises:
        UserError: what `load_autoencoder` and `check_decoder` raise.
    """
    decoder = load_autoencoder(spec, weights=weights, device=device)
    return DecodedBy(autoencoder, decoder).eval().requires_grad_(False)


def check_decoder(decoder: Autoencoder, autoencoder: Autoencoder) -> None:
    """Can `decoder` decode the latents of `autoencoder`? The same shape is needed, and as far as is known the same space.

    Raises:
        UserError: another shape of latents; spaces known to differ; per-channel normalisation, which a distilled decoder
            does not know; two full autoencoders of unknown space whose encoders differ. For a distilled decoder with
            an autoencoder of unknown space, the user's word is taken.
    """
    names = f"The latents of {autoencoder.name!r} cannot be decoded by {decoder.name!r}"
    if (decoder.channels, decoder.factor) != (autoencoder.channels, autoencoder.factor):
        raise UserError(
            f"{names}: {autoencoder.channels} channels at 1/{autoencoder.factor} of the size against {decoder.channels} "
            f"at 1/{decoder.factor}; choose a decoder of the same latents."
        )
    # An empty name is a space that nobody named, of which nothing can be said.
    known = decoder.space and autoencoder.space
    if known and decoder.space != autoencoder.space:
        raise UserError(
            f"{names}: those are latents of {autoencoder.space}, these of {decoder.space}; choose a decoder of the "
            "same latent space."
        )
    distilled = decoder.distilled or autoencoder.distilled
    if distilled and not (isinstance(autoencoder.scale, float | int) and isinstance(decoder.scale, float | int)):
        raise UserError(
            f"{names}: the one is normalised channel by channel, the other scaled by one number; choose a decoder "
            "that is not distilled."
        )
    if not (distilled or known) and decoder.identity["sha256"] != autoencoder.identity["sha256"]:
        raise UserError(
            f"{names}: their encoders differ, so nothing says that they share a latent space; choose a decoder that "
            "was trained for the same encoder."
        )
