"""What every autoencoder does: uint8 images -> moments (stored) -> latents (what models see) -> uint8 images.

N batch, C latent channels, H W image, h = H / factor and w = W / factor latent. M = 2C: mean and standard deviation; M = C, the
mean alone, of an autoencoder without a posterior.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.base.frozen import Frozen, load_frozen
from repa.base.precision import Float32Default
from repa.base.weights import digest_of


class Autoencoder(Frozen):
    """A frozen autoencoder. A subclass gives `moments` and `images`, on floats in [-1, 1] and unscaled latents.

    Attributes:
        name: the spec it was loaded by.
        channels: C.
        factor: pixels per latent, along each side.
        resolution: the one side of images that it takes; 0: any that is a multiple of the factor.
        scale, shift: latents = (z - shift) * scale; a number, or one for each channel.
        space: name of the latent space, which other autoencoders may share; empty when not known.
        distilled: was it trained to take another one's place in the scaled latents, as TAESD? They are then what it
            shares with those of its space; all others share the unscaled ones.
        stochastic: does `sample` draw noise, or is the standard deviation always 0, and left out of what is stored?
        stores_moments: are moments worth storing, or as cheap to recompute from the images as to read?
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
        # Buffers, so that they go to the device with the rest and no step copies them there.
        for buffer, value in (("_scale", scale), ("_shift", shift)):
            tensor = torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)  # (1 or C, 1, 1)
            assert len(tensor) in (1, channels), f"{len(tensor)} values for {channels} channels"
            self.register_buffer(buffer, tensor, persistent=False)

    @property
    def stored_channels(self) -> int:
        """M, of the moments."""
        return 2 * self.channels if self.stochastic else self.channels

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) in [-1, 1] -> mean and standard deviation, each (N, C, h, w)."""
        raise NotImplementedError

    def images(self, z: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]."""
        raise NotImplementedError

    def encoder_weights(self) -> Mapping[str, Tensor]:
        """The tensors that decide the moments; none for an autoencoder without weights."""
        return {}

    @torch.no_grad()
    def encode(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 images (N, 3, H, W) -> float32 moments (N, M, h, w), unscaled.

        Computed in the precision of the weights, whatever autocast the caller runs under: what is stored must not
        depend on who asked. Only `dtype`, bfloat16 or float16, computes the matrix products in another.
        """
        self._check_images(images)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            mean, std = self.moments(images.float() / 127.5 - 1)
            return (torch.cat([mean, std], dim=1) if self.stochastic else mean).float()

    @torch.no_grad()
    def sample(self, moments: Tensor, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """Moments (N, M, h, w) -> float32 latents (N, C, h, w), scaled: (mean + std * noise - shift) * scale.

        Args:
            moments: as `encode` gave them, in any precision.
            generator: where the noise comes from, on any device; the global generator when None.
            noise: (N, C, h, w) standard normal drawn by the caller, instead of a generator.
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

        Only `dtype`, bfloat16 or float16, computes the convolutions in less than the precision of the weights.
        Rounds to the nearest grey level, as DiT and SiT do; REPA's reference truncates, half a level darker on average.
        """
        self._check_channels(latents, self.channels, "latents")
        with torch.autocast(latents.device.type, dtype=dtype, enabled=dtype != torch.float32):
            images = self.images(latents.float() / self._scale + self._shift)
        if bad := not_finite(images):
            raise UserError(
                f"The autoencoder {self.name!r} decodes image {bad[0]} of {len(images)} to values that are not finite: check its "
                "weights and the latents."
            )
        # The conversion cuts off, so + 128 is + 127.5 for the range and + 0.5 to round.
        return (127.5 * images.float() + 128).clamp(0, 255).to(torch.uint8)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a manifest records: name, scale, shift, whether it has deviations, and the checksum of the encoder.

        Of the encoder alone: autoencoders that differ in the decoder only (sd-vae-ft-mse and -ema) share their latents.
        """
        weights = self.encoder_weights()
        checksum = digest_of(weights) if weights else None
        scale, shift = (list(v) if isinstance(v, Sequence) else v for v in (self.scale, self.shift))
        return {"name": self.name, "sha256": checksum, "scale": scale, "shift": shift, "stochastic": self.stochastic}

    def release_networks(self) -> None:
        """Let encoder and decoder go, and the memory they take; `sample` needs scale and shift alone."""
        for name, _ in list(self.named_children()):
            delattr(self, name)

    def _check_images(self, images: Tensor) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"The autoencoder {self.name!r} takes uint8 images (N, 3, H, W), but got {_describe(images)}: "
                f"give the pixels 0 to 255, unscaled."
            )
        self.check_resolution(images.shape[2], images.shape[3])

    def check_resolution(self, height: int, width: int) -> None:
        """Raises UserError unless it takes images of this size."""
        if self.resolution and (height, width) != (self.resolution, self.resolution):
            raise UserError(
                f"The autoencoder {self.name!r} takes images of {self.resolution} x {self.resolution} alone, but got {height} x "
                f"{width}: choose --resolution {self.resolution}."
            )
        if height % self.factor or width % self.factor:
            raise UserError(
                f"The autoencoder {self.name!r} takes images whose sides are multiples of {self.factor}, "
                f"but got {height} x {width}: crop or resize them first, or choose another --resolution."
            )

    def _check_channels(self, tensor: Tensor, channels: int, what: str) -> None:
        if tensor.ndim != 4 or tensor.shape[1] != channels or not tensor.is_floating_point():
            expected = f"{what} as floats (N, {channels}, h, w)"
            raise UserError(f"The autoencoder {self.name!r} takes {expected}, but got {_describe(tensor)}.")


class Pixels(Autoencoder):
    """The identity on images in [-1, 1]; every grey level survives the round trip."""

    stochastic = False
    stores_moments = False

    def __init__(self, name: str):
        super().__init__(name, channels=3, factor=1, scale=1.0, shift=0.0, space="pixels")

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)

    def images(self, z: Tensor) -> Tensor:
        return z


def pixels(name: str, weights: str | Path | None) -> Pixels:
    """No autoencoder: the network learns the pixels themselves."""
    if weights is not None:
        raise UserError(f"The autoencoder {name!r} has no weights, but got {weights}: leave them out.")
    return Pixels(name)


@Float32Default()
def load_autoencoder(
    spec: str, *, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The autoencoder that a spec names, frozen, on a device.

    Args:
        spec: a name of AUTOENCODERS, or the dotted name of an Autoencoder of your own, or of function(name, weights) -> Autoencoder.
        weights: folder (as diffusers saves it) or hub name to load from; None for the name's own hub repository.
        device: where it computes.

    Raises:
        UserError: an unknown name, or weights that are missing, damaged or of another kind.
    """
    from repa.autoencoders import AUTOENCODERS

    return load_frozen(AUTOENCODERS, Autoencoder, spec, weights, device)


def require_same_autoencoder(recorded: object, autoencoder: Autoencoder, where: object) -> None:
    """UserError when the latents of `where`, whose record is `recorded`, are by other weights of this autoencoder."""
    sha256 = recorded.get("sha256") if isinstance(recorded, dict) else None
    if sha256 is not None and autoencoder.identity["sha256"] != sha256:
        raise UserError(
            f"The latents of {where} were made by weights of {autoencoder.name} with the checksum {str(sha256)[:12]}, but those "
            f"that were loaded have {str(autoencoder.identity['sha256'])[:12]}: give the same weights as --autoencoder-weights FOLDER."
        )


def not_finite(x: Tensor) -> list[int]:
    """Rows of (N, ...) that hold NaN or infinity."""
    return (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
