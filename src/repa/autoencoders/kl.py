"""Autoencoders with a Gaussian posterior: AutoencoderKL of diffusers (Rombach et al., arXiv 2112.10752).

Channels, factor, scale and shift are those of the weights' own config.json; none of them is written here.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.autoencoders.contract import Autoencoder
from repa.autoencoders.loading import load_diffusers
from repa.base.errors import UserError

PACKAGED = Path(__file__).parent / "weights" / "tiny-vae"  # written by tools/train_tiny_vae.py


class KLAutoencoder(Autoencoder):
    """A diffusers AutoencoderKL."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        scale, shift = _scale_and_shift(name, vae.config)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        super().__init__(
            name, channels=vae.config.latent_channels, factor=factor, scale=scale, shift=shift, space=space
        )
        self.vae = vae

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.std

    def images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def encoder_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}


def sd_vae_ft_mse(weights: str | Path | None) -> KLAutoencoder:
    """Stable Diffusion's autoencoder, decoder fine-tuned for MSE: what REPA encodes ImageNet with."""
    return _load("sd-vae-ft-mse", weights or "stabilityai/sd-vae-ft-mse", space="sd")


def sd_vae_ft_ema(weights: str | Path | None) -> KLAutoencoder:
    """The encoder of sd-vae-ft-mse, decoder fine-tuned by EMA: what REPA decodes its samples with."""
    return _load("sd-vae-ft-ema", weights or "stabilityai/sd-vae-ft-ema", space="sd")


def sdxl_vae(weights: str | Path | None) -> KLAutoencoder:
    """Stable Diffusion XL's autoencoder: 4 channels, but not those of Stable Diffusion."""
    return _load("sdxl-vae", weights or "stabilityai/sdxl-vae", space="sdxl")


def sd3_vae(weights: str | Path | None) -> KLAutoencoder:
    """Stable Diffusion 3's autoencoder: 16 channels, with a shift."""
    return _load("sd3-vae", weights or "stabilityai/stable-diffusion-3-medium-diffusers", "vae", space="sd3")


def flux_vae(weights: str | Path | None) -> KLAutoencoder:
    """FLUX.1's autoencoder: 16 channels, with a shift; not those of Stable Diffusion 3."""
    return _load("flux-vae", weights or "black-forest-labs/FLUX.1-dev", "vae", space="flux")


def va_vae(weights: str | Path | None) -> KLAutoencoder:
    """VA-VAE, aligned to DINOv2-L: 32 channels at a 16th of the size, normalised channel by channel."""
    return _load("va-vae", weights or "REPA-E/vavae-hf", space="va-vae")


def e2e_va_vae(weights: str | Path | None) -> KLAutoencoder:
    """VA-VAE as REPA-E trained it further, together with a network."""
    return _load("e2e-va-vae", weights or "REPA-E/e2e-vavae-hf", space="e2e-va-vae")


def tiny_vae(weights: str | Path | None) -> KLAutoencoder:
    """An autoencoder inside the package, for tests and lessons offline: factor 4, 4 channels (docs/tiny-encoder.md)."""
    return _load("tiny-vae", weights or PACKAGED)


def kl(weights: str | Path | None, *, hub: str = "", subfolder: str = "") -> KLAutoencoder:
    """Any other AutoencoderKL, by its name on the hub or from a folder.

    Args:
        hub: owner/name of its repository.
        subfolder: where it lies in the repository or folder; "vae" in a whole pipeline.
    """
    if not (weights or hub):
        raise UserError(
            "The autoencoder 'kl' needs weights: a folder that diffusers saved, or a name on the hub as in "
            "'kl:hub=owner/name,subfolder=vae'."
        )
    settings = ",".join(f"{key}={value}" for key, value in (("hub", hub), ("subfolder", subfolder)) if value)
    return _load(f"kl:{settings}" if settings else "kl", weights or str(hub), str(subfolder))


def _load(name: str, source: str | Path, subfolder: str = "", space: str = "") -> KLAutoencoder:
    return KLAutoencoder(name, load_diffusers("AutoencoderKL", name, source, subfolder), space)


def _scale_and_shift(name: str, config: Any) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Of a configuration: one number for all channels, or the mean and deviation of each, as diffusers' pipelines do.

    Those of SDXL: (z - latents_mean) * scaling_factor / latents_std; those of SD3: (z - shift_factor) * scaling_factor.
    """
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return config.scaling_factor, config.shift_factor or 0.0
    if mean is None or std is None or config.shift_factor:
        raise UserError(
            f"The config.json of the autoencoder {name!r} must give latents_mean and latents_std together and no "
            f"shift_factor, but gives {mean}, {std} and {config.shift_factor}: correct it."
        )
    if not len(mean) == len(std) == config.latent_channels or min(std) <= 0:
        raise UserError(
            f"The config.json of the autoencoder {name!r} must give a latents_mean and a positive latents_std for each of "
            f"its {config.latent_channels} channels, but gives {mean} and {std}: correct it."
        )
    return tuple(config.scaling_factor / deviation for deviation in std), tuple(mean)
