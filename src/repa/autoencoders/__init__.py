"""Pixels <-> latents behind one contract; scale and shift of the latents are known only in here."""

from repa.base.lazy import exports
from repa.base.registry import Registry

# each entry is a function of `weights` (None, a folder or a hub name) that returns an Autoencoder
AUTOENCODERS = Registry(
    "autoencoder",
    {
        "pixels": "repa.autoencoders.pixels:pixels",
        "sd-vae-ft-mse": "repa.autoencoders.kl:sd_vae_ft_mse",
        "sd-vae-ft-ema": "repa.autoencoders.kl:sd_vae_ft_ema",
        "kl": "repa.autoencoders.kl:kl",
        "taesd": "repa.autoencoders.taesd:taesd",
    },
)

__getattr__, __dir__, __all__ = exports(
    __name__, {"Autoencoder": "contract", "load_autoencoder": "contract"}, local=("AUTOENCODERS",)
)
