"""Pixels <-> latents behind one contract; scale and shift of the latents are known only in here."""

from typing import TYPE_CHECKING

from repa.base.lazy import exports
from repa.base.registry import Registry

# Of the paper: its encoder is also that of sd-vae-ft-mse, its decoder made the published figures.
AUTOENCODER = "sd-vae-ft-ema"

# each entry is a function of `weights` (None, a folder or a hub name) that returns an Autoencoder
AUTOENCODERS = Registry(
    "autoencoder",
    {
        "pixels": "repa.autoencoders.contract:pixels",
        "sd-vae-ft-mse": "repa.autoencoders.kl:sd_vae_ft_mse",
        "sd-vae-ft-ema": "repa.autoencoders.kl:sd_vae_ft_ema",
        "sdxl-vae": "repa.autoencoders.kl:sdxl_vae",
        "sd3-vae": "repa.autoencoders.kl:sd3_vae",
        "flux-vae": "repa.autoencoders.kl:flux_vae",
        "va-vae": "repa.autoencoders.kl:va_vae",
        "e2e-va-vae": "repa.autoencoders.kl:e2e_va_vae",
        "tiny-vae": "repa.autoencoders.kl:tiny_vae",  # inside the package
        "kl": "repa.autoencoders.kl:kl",  # any other: kl:hub=owner/name,subfolder=vae
        "dc-ae-f32": "repa.autoencoders.deterministic:dc_ae_f32",
        "rae-dinov2-b": "repa.autoencoders.deterministic:rae_dinov2_b",
        "rae": "repa.autoencoders.deterministic:rae",  # any other: rae:hub=owner/name
        "taesd": "repa.autoencoders.deterministic:taesd",
        "taesdxl": "repa.autoencoders.deterministic:taesdxl",
        "taesd3": "repa.autoencoders.deterministic:taesd3",
        "taef1": "repa.autoencoders.deterministic:taef1",
    },
    base="repa.autoencoders.contract:Autoencoder",
    listing="autoencoders",
)

if TYPE_CHECKING:
    from repa.autoencoders.contract import Autoencoder as Autoencoder
    from repa.autoencoders.contract import load_autoencoder as load_autoencoder
    from repa.autoencoders.decoders import check_decoder as check_decoder
    from repa.autoencoders.decoders import load_decoder as load_decoder
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("AUTOENCODERS",))
