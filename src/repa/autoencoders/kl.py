"""Autoencoders with a Gaussian posterior: AutoencoderKL of diffusers (Rombach et al., arXiv 2112.10752)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from repa.autoencoders.contract import Autoencoder
from repa.base.errors import UserError


class KLAutoencoder(Autoencoder):
    """A diffusers AutoencoderKL; channels, factor, scale and shift are those of its configuration."""

    def __init__(self, name: str, vae: Any):
        config = vae.config
        if config.latents_mean is not None or config.latents_std is not None:
            raise UserError(f"The autoencoder {name!r} normalises its latents per channel, which is not supported.")
        super().__init__(
            name,
            channels=config.latent_channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
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
    return _load("sd-vae-ft-mse", weights or "stabilityai/sd-vae-ft-mse")


def sd_vae_ft_ema(weights: str | Path | None) -> KLAutoencoder:
    """The same encoder with the decoder fine-tuned by EMA: what REPA decodes its samples with."""
    return _load("sd-vae-ft-ema", weights or "stabilityai/sd-vae-ft-ema")


def kl(weights: str | Path | None) -> KLAutoencoder:
    """Any other AutoencoderKL, from a folder or the hub."""
    if weights is None:
        raise UserError("The autoencoder 'kl' needs weights: a folder that diffusers saved, or a hub name.")
    return _load("kl", weights)


def _load(name: str, source: str | Path) -> KLAutoencoder:
    return KLAutoencoder(name, load_diffusers("AutoencoderKL", name, source))


def load_diffusers(kind: str, name: str, source: str | Path) -> Any:
    """The model of diffusers' class `kind` in a local folder or hub repository, every tensor of it from there.

    Raises:
        UserError: no such folder or repository, a damaged file, a model of another class, tensors that do not fit.
    """
    diffusers = _diffusers()
    local = Path(source).is_dir()
    options = {"local_files_only": local, "low_cpu_mem_usage": False}  # False: needs no accelerate, prints no notice
    try:
        config = diffusers.AutoencoderKL.load_config(str(source), local_files_only=local)
        found = config.get("_class_name", kind)
        if found != kind:
            raise UserError(f"The autoencoder {name!r} is a {kind}, but {source} holds a {found}: name other weights.")
        model, report = getattr(diffusers, kind).from_pretrained(str(source), output_loading_info=True, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(_not_loaded(name, source, local, reason)) from error
    strays = [*report["missing_keys"], *report["unexpected_keys"]]
    if strays:  # diffusers only warns, and leaves missing tensors random
        raise UserError(_not_loaded(name, source, local, f"its weights do not fit, for example {strays[0]!r}"))
    return model


def _diffusers() -> Any:
    try:
        import diffusers

        diffusers.AutoencoderKL  # noqa: B018  the import proper: diffusers is lazy
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"diffusers cannot be imported ({reason}): install it, and remove a torchvision built for another torch."
        ) from error
    return diffusers


def _not_loaded(name: str, source: str | Path, local: bool, reason: str) -> str:
    if local:
        return f"The autoencoder {name!r} cannot be loaded from the folder {source}: {reason}."
    return (
        f"The autoencoder {name!r} cannot be loaded: {source} is neither a folder here nor to be had from the hub of "
        f"Hugging Face or its cache. Where there is a network, download its config.json and "
        f"diffusion_pytorch_model.safetensors, and give that folder as the autoencoder's weights. "
        f"(The hub's client said: {reason})"
    )
