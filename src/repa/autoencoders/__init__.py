"""Autoencoders between pixels and latents; scale and shift of the latents are applied only here."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from repa.base.imports import exports
from repa.base.registry import Registry

# The paper's: sd-vae-ft-mse has the same encoder, and this decoder produced the published results.
AUTOENCODER = "sd-vae-ft-ema"


class Released(NamedTuple):
    """A published autoencoder in diffusers' format."""

    kind: str  # class name in diffusers
    hub: str  # owner/name, or a folder inside the package
    space: str  # latent space: autoencoders of the same space can decode each other's latents
    about: str
    subfolder: str = ""


PACKAGED = Path(__file__).parent / "weights" / "tiny-vae"  # written by tools/train_tiny_vae.py
_KL, _TINY = "AutoencoderKL", "AutoencoderTiny"
_SD3, _FLUX = "stabilityai/stable-diffusion-3-medium-diffusers", "black-forest-labs/FLUX.1-dev"
_DC, _RAE = "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"
RELEASED = {
    "sd-vae-ft-mse": Released(_KL, "stabilityai/sd-vae-ft-mse", "sd",
        "Stable Diffusion's autoencoder, decoder fine-tuned for MSE; REPA encodes ImageNet with it."),
    "sd-vae-ft-ema": Released(_KL, "stabilityai/sd-vae-ft-ema", "sd",
        "The encoder of sd-vae-ft-mse, decoder fine-tuned with EMA; REPA decodes its samples with it."),
    "sdxl-vae": Released(_KL, "stabilityai/sdxl-vae", "sdxl",
        "Stable Diffusion XL's autoencoder: 4 channels, but another latent space than Stable Diffusion."),
    "sd3-vae": Released(_KL, _SD3, "sd3",
        "Stable Diffusion 3's autoencoder: 16 channels, with a shift.", "vae"),
    "flux-vae": Released(_KL, _FLUX, "flux",
        "FLUX.1's autoencoder: 16 channels, with a shift; another latent space than Stable Diffusion 3.", "vae"),
    "va-vae": Released(_KL, "REPA-E/vavae-hf", "va-vae",
        "VA-VAE, aligned to DINOv2-L: 32 channels at a 16th of the size, normalised per channel."),
    "e2e-va-vae": Released(_KL, "REPA-E/e2e-vavae-hf", "e2e-va-vae",
        "VA-VAE after REPA-E's joint training with a diffusion network."),
    "tiny-vae": Released(_KL, str(PACKAGED), "",
        "A small autoencoder in this package, for offline tests and lessons: factor 4, 4 channels (docs/tiny-encoder.md)."),
    "dc-ae-f32": Released("AutoencoderDC", _DC, "dc-ae-f32",
        "DC-AE trained on ImageNet: 32 channels at a 32nd of the size; 512 pixels become 16 x 16 latents."),
    "rae-dinov2-b": Released("AutoencoderRAE", _RAE, "rae-dinov2-b",
        "The representation autoencoder of DINOv2-B with registers: 768 channels at a 16th of the size, 16 x 16 for images of 256 pixels."),
    "taesd": Released(_TINY, "madebyollin/taesd", "sd",
        "Small and fast, for the latents of sd-vae-ft-mse and sd-vae-ft-ema."),
    "taesdxl": Released(_TINY, "madebyollin/taesdxl", "sdxl",
        "Small and fast, for the latents of sdxl-vae."),
    "taesd3": Released(_TINY, "madebyollin/taesd3", "sd3",
        "Small and fast, for the latents of sd3-vae."),
    "taef1": Released(_TINY, "madebyollin/taef1", "flux",
        "Small and fast, for the latents of flux-vae."),
}  # fmt: skip

# each entry is a function (name, weights) -> Autoencoder; weights is None, a folder or a hub name
AUTOENCODERS = Registry(
    "autoencoder",
    {
        "pixels": "repa.autoencoders.contract:pixels",
        **dict.fromkeys(RELEASED, "repa.autoencoders.released:load_released"),
        "kl": "repa.autoencoders.released:kl",  # any other: kl:hub=owner/name,subfolder=vae
        "rae": "repa.autoencoders.released:rae",  # any other: rae:hub=owner/name
    },
    base="repa.autoencoders.contract:Autoencoder",
    listing="autoencoders",
    takes=("name", "weights"),
    facts={name: released.about for name, released in RELEASED.items()},
)

if TYPE_CHECKING:
    from repa.autoencoders.contract import Autoencoder as Autoencoder
    from repa.autoencoders.contract import check_decoder as check_decoder
    from repa.autoencoders.contract import load_autoencoder as load_autoencoder
    from repa.autoencoders.contract import load_decoder as load_decoder
else:
    __getattr__, __dir__, __all__ = exports(__name__, local=("AUTOENCODERS",))
