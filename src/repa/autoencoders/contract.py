"""The interface of autoencoders: uint8 images -> moments (stored) -> latents (input of models) -> uint8 images.

N batch, C latent channels, H W image, h = H / factor and w = W / factor latent. M = 2C: mean and standard deviation; M = C: only
the mean, for an autoencoder without a posterior. The decoder of another autoencoder of the same latent space may replace its
own, such as a faster one for previews.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.base.device import Float32Default
from repa.base.errors import UserError
from repa.base.pretrained import Frozen, load_frozen
from repa.base.weights import digest_of


class Autoencoder(Frozen):
    """A frozen autoencoder. Subclasses implement `moments` and `images`, on floats in [-1, 1] and unscaled latents.

    Attributes:
        name: the spec by which it was loaded.
        channels: C.
        factor: pixels per latent, along each side.
        resolution: the only image side that it accepts; 0: any multiple of the factor.
        scale, shift: latents = (z - shift) * scale; one number, or one per channel.
        space: name of the latent space, which other autoencoders may share; empty if unknown.
        distilled: whether it was distilled from another autoencoder in the scaled latents, as TAESD. Autoencoders of a space
            share the scaled latents with a distilled one, and the unscaled latents otherwise.
        stochastic: whether `sample` adds noise; otherwise the standard deviation is always 0 and is not stored.
        stores_moments: whether to store moments; False if recomputing them from the images is as cheap as reading them.
    """

    stochastic: bool = True
    stores_moments: bool = True
    distilled: bool = False
    resolution: int = 0
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        name: str,
        *,
        channels: int,
        factor: int,
        scale: float | Sequence[float],
        shift: float | Sequence[float],
        space: str = "",
    ):
        super().__init__()
        self.name, self.channels, self.factor, self.space = name, channels, factor, space
        self.scale, self.shift = scale, shift
        # Buffers, so that they move to the device with the module and no step copies them.
        for buffer, value in (("_scale", scale), ("_shift", shift)):
            tensor = torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)  # (1 or C, 1, 1)
            assert len(tensor) in (1, channels), f"{len(tensor)} values for {channels} channels"
            self.register_buffer(buffer, tensor, persistent=False)

    @property
    def stored_channels(self) -> int:
        """M, the number of channels of the moments."""
        return 2 * self.channels if self.stochastic else self.channels

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] -> mean and standard deviation, each (N, C, h, w)."""
        raise NotImplementedError

    def images(self, z: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]."""
        raise NotImplementedError

    def encoder_weights(self) -> Mapping[str, Tensor]:
        """The tensors that determine the moments; empty for an autoencoder without weights."""
        return {}

    @torch.no_grad()
    def encode(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images (N, 3, H, W) -> float32 moments (N, M, h, w), unscaled.

        Computed in the precision of the weights, regardless of the caller's autocast, because stored moments must not depend
        on the caller. With `dtype` bfloat16 or float16 the matrix products use that precision.
        """
        self._check_images(images)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            mean, std = self.moments(images.float() / 127.5 - 1)
            return (torch.cat([mean, std], dim=1) if self.stochastic else mean).float()

    @torch.no_grad()
    def sample(self, moments: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Moments (N, M, h, w) -> float32 latents (N, C, h, w), scaled: (mean + std * noise - shift) * scale.

        Args:
            moments: as returned by `encode`, in any precision.
            generator: generator of the noise, on any device; None: the global generator.
            noise: (N, C, h, w) standard normal noise instead of a generator.
        """
        self._check_channels(moments, self.stored_channels, "moments")
        mean = moments.float()
        if self.stochastic:
            mean, std = mean.chunk(2, dim=1)  # (N, C, h, w) each
            if noise is None:
                device = generator.device if generator else mean.device
                noise = torch.randn(mean.shape, generator=generator, device=device)
            assert noise.shape == mean.shape, f"noise {tuple(noise.shape)} for a mean {tuple(mean.shape)}"
            mean = mean + std * noise.to(mean)
        return (mean - self._shift) * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Scaled latents (N, C, h, w) -> uint8 images (N, 3, H, W).

        With `dtype` bfloat16 or float16 the convolutions use that precision instead of that of the weights.
        Rounds to the nearest grey level, as DiT and SiT do; REPA's code truncates, which is half a level darker on average.
        """
        self._check_channels(latents, self.channels, "latents")
        with torch.autocast(latents.device.type, dtype=dtype, enabled=dtype != torch.float32):
            images = self.images(latents.float() / self._scale + self._shift)
        if bad := not_finite(images):
            raise UserError(
                f"The autoencoder {self.name!r} decoded image {bad[0]} of {len(images)} to non-finite values: check its "
                "weights and the latents."
            )
        # The conversion to uint8 truncates, so + 128 is + 127.5 for the range and + 0.5 to round.
        return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The identity for manifests: name, scale, shift, stochastic, and the checksum of the encoder.

        The decoder is not included: autoencoders that differ only in it (sd-vae-ft-mse and -ema) share their latents.
        """
        weights = self.encoder_weights()
        checksum = digest_of(weights) if weights else None
        scale, shift = (list(v) if isinstance(v, Sequence) else v for v in (self.scale, self.shift))
        return {"name": self.name, "sha256": checksum, "scale": scale, "shift": shift, "stochastic": self.stochastic}

    def release_networks(self) -> None:
        """Free the memory of encoder and decoder; `sample` needs only scale and shift."""
        for name, _ in list(self.named_children()):
            delattr(self, name)

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"The autoencoder {self.name!r} needs uint8 images (N, 3, H, W), but got {_describe(images)}: "
                f"give the pixels 0 to 255, unscaled."
            )
        self.check_resolution(images.shape[2], images.shape[3])

    def check_resolution(self, height: int, width: int) -> None:
        """Raises UserError unless it accepts images of this size."""
        if self.resolution and (height, width) != (self.resolution, self.resolution):
            raise UserError(
                f"The autoencoder {self.name!r} accepts only images of {self.resolution} x {self.resolution}, but got {height} x "
                f"{width}: choose --resolution {self.resolution}."
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"The autoencoder {self.name!r} needs images with sides that are multiples of {self.factor}, "
                f"but got {height} x {width}: crop or resize them first, or choose another --resolution."
            )

    def _check_channels(self, tensor: Tensor, channels: int, what: str) -> None:
        if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.is_floating_point():
            expected = f"{what} as floats (N, {channels}, h, w)"
            raise UserError(f"The autoencoder {self.name!r} needs {expected}, but got {_describe(tensor)}.")


class Pixels(Autoencoder):
    """The identity on images in [-1, 1]; the round trip is exact for every grey level."""

    stochastic = False
    stores_moments = False

    def __init__(self, name: str):
        super().__init__(name, channels=3, factor=1, scale=1.0, shift=0.0, space="pixels")

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def images(self, z: Tensor) -> Tensor:
        return z


def pixels(name: str, weights: str | Path | None) -> Pixels:
    """No autoencoder: the network is trained on pixels."""
    if weights is not None:
        raise UserError(f"The autoencoder {name!r} has no weights, but got {weights}: remove the option.")
    return Pixels(name)


@Float32Default()
def load_autoencoder(
    spec: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """A frozen autoencoder by its spec, on a device.

    Args:
        spec: a name of AUTOENCODERS, or the dotted name of your own Autoencoder or function(name, weights) -> Autoencoder.
        weights: folder in diffusers' format, or hub name; None: the hub repository of this name.
        device: device of the autoencoder.

    Raises:
        UserError: an unknown name, or weights that are missing, damaged or of another kind.
    """
    from repa.autoencoders import AUTOENCODERS

    return load_frozen(AUTOENCODERS, Autoencoder, spec, weights, device)


def require_same_autoencoder(recorded: object, autoencoder: Autoencoder, where: object) -> None:
    """Raises UserError if the latents of `where`, with the record `recorded`, have other weights or another scale."""
    recorded = recorded if isinstance(recorded, dict) else {}
    sha256, remedy = recorded.get("sha256"), "give the same weights as --autoencoder-weights FOLDER."
    if sha256 is not None and autoencoder.identity["sha256"] != sha256:
        raise UserError(
            f"The latents of {where} were encoded with weights of {autoencoder.name} with the checksum {str(sha256)[:12]}, but the loaded "
            f"weights have {str(autoencoder.identity['sha256'])[:12]}: {remedy}"
        )
    # The config.json of a folder holds them, so equal weights may have others.
    for key in ("scale", "shift", "stochastic"):
        if key in recorded and recorded[key] != autoencoder.identity[key]:
            raise UserError(
                f"The latents of {where} have the {key} {recorded[key]!r:.80}, but the loaded {autoencoder.name} has "
                f"{autoencoder.identity[key]!r:.80}: {remedy}"
            )


def not_finite(x: Tensor) -> list[int]:
    """Indices of the samples in (N, ...) that contain NaN or infinity."""
    return (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


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
