"""Autoencoders of diffusers, from the hub or from a folder; `repa.autoencoders` has the table of names.

* AutoencoderKL (Rombach et al., arXiv 2112.10752): a Gaussian posterior.
* AutoencoderDC (Chen et al., arXiv 2410.10733): deep compression, 32 pixels per latent.
* AutoencoderTiny (TAESD): small and fast, distilled from a larger autoencoder, which it can replace.
* AutoencoderRAE (Zheng et al., arXiv 2510.11690): the latents are the tokens of a frozen encoder, one per patch, normalised by
  the mean and deviation of each channel at each position. The weights contain these statistics, the encoder and the decoder,
  and fix the image size.

Channels, factor, scale and shift come from the config.json of the weights.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repa.autoencoders import RELEASED
from repa.autoencoders.contract import Autoencoder
from repa.base import faults, imports
from repa.base.errors import UserError
from repa.base.pretrained import CONFIG, Repository, found_of, weights_named
from repa.base.weights import no_larger_than

WEIGHTS = weights_named("diffusion_pytorch_model", "diffusion_pytorch_model")
# tensors that determine a RAE's latents besides its encoder
STATISTICS = ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std")


class KLAutoencoder(Autoencoder):
    """A diffusers AutoencoderKL."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        config = vae.config
        scale, shift = _scale_and_shift(name, config)
        factor = 2 ** (len(config.block_out_channels) - 1)  # every level except the first halves the sides
        super().__init__(name, channels=config.latent_channels, factor=factor, scale=scale, shift=shift, space=space)
        self.vae = vae

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(x).latent_dist
        return posterior.mean, posterior.std

    def images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def encoder_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}


class DeterministicAutoencoder(Autoencoder):
    """An autoencoder of diffusers without a posterior: its encoder returns the latents, and the standard deviation is 0."""

    stochastic = False

    def __init__(self, name: str, vae: Any, space: str = "", *, channels: int = 0, factor: int = 0):
        config = vae.config
        super().__init__(
            name, channels=channels or config.latent_channels, factor=factor or 2 ** (len(config.encoder_block_out_channels) - 1),
            scale=config.scaling_factor, shift=config.get("shift_factor") or 0.0, space=space,
        )  # fmt: skip
        self.vae = vae

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # By index: the field is `latent` in one class of diffusers and `latents` in another.
        mean = self.vae.encode(x)[0]
        return mean, torch.zeros_like(mean)

    def images(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def encoder_weights(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.vae.state_dict().items() if k.startswith("encoder.") or k in STATISTICS}


class TinyAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderTiny; its latents are the scaled latents of the larger autoencoder."""

    distilled = True


class RepresentationAutoencoder(DeterministicAutoencoder):
    """A diffusers AutoencoderRAE, on pixels in [0, 1]. It normalises its latents itself and applies its own scale and shift."""

    def __init__(self, name: str, vae: Any, space: str = ""):
        super().__init__(name, vae, space, channels=vae.config.encoder_hidden_size, factor=vae.config.patch_size)
        self.resolution = vae.decoder_image_size
        # Autoencoder multiplies by the scale, so diffusers must not do it too.
        vae.register_to_config(scaling_factor=1.0)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().moments((x + 1) / 2)

    def images(self, z: Tensor) -> Tensor:
        return 2 * super().images(z) - 1


CLASSES: dict[str, type[KLAutoencoder] | type[DeterministicAutoencoder]] = {
    "AutoencoderKL": KLAutoencoder,
    "AutoencoderDC": DeterministicAutoencoder,
    "AutoencoderTiny": TinyAutoencoder,
    "AutoencoderRAE": RepresentationAutoencoder,
}


def load_released(name: str, weights: str | Path | None) -> Autoencoder:
    """The autoencoder `name` of RELEASED, from `weights` or from the hub."""
    released = RELEASED[name]
    return _load(released.kind, name, weights or released.hub, released.subfolder, released.space)


def kl(name: str, weights: str | Path | None, *, hub: str = "", subfolder: str = "") -> Autoencoder:
    """Any other AutoencoderKL, by its name on the hub or from a folder.

    Args:
        hub: owner/name of its repository.
        subfolder: its folder in the repository or folder; "vae" in a pipeline.
    """
    return _load_any(
        "AutoencoderKL", name, weights, {"hub": hub, "subfolder": subfolder}, "hub=owner/name,subfolder=vae"
    )


def rae(name: str, weights: str | Path | None, *, hub: str = "") -> Autoencoder:
    """Any other AutoencoderRAE, by its name on the hub or from a folder.

    Args:
        hub: owner/name of its repository.
    """
    return _load_any("AutoencoderRAE", name, weights, {"hub": hub}, "hub=owner/name")


def _load_any(kind: str, name: str, weights: str | Path | None, given: dict[str, str], example: str) -> Autoencoder:
    if not (weights or given["hub"]):
        raise UserError(
            f"The autoencoder {name!r} needs weights: give a folder in diffusers' format, or a name on the hub as in '{name}:{example}'."
        )
    settings = ",".join(f"{key}={value}" for key, value in given.items() if value)
    spec = f"{name}:{settings}" if settings else name
    return _load(kind, spec, weights or str(given["hub"]), str(given.get("subfolder", "")))


def _load(kind: str, name: str, source: str | Path, subfolder: str = "", space: str = "") -> Autoencoder:
    vae = load_diffusers(kind, name, source, subfolder)
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    if not _is_number(scale) or scale == 0 or not _is_number(shift):
        raise UserError(
            f"The config.json of {source} has the scaling_factor {scale!r:.80} and the shift_factor {shift!r:.80}: they must be "
            "numbers, the first not 0. Correct it."
        )
    return CLASSES[kind](name, vae, space)


def _is_number(value: Any) -> bool:
    """Whether a value of a configuration is a number that float32 can hold."""
    return type(value) in (int, float) and abs(value) < 1e38


def _scale_and_shift(name: str, config: Any) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
    """Scale and shift of a configuration: one number for all channels, or one per channel, as in diffusers' pipelines.

    SDXL's: (z - latents_mean) * scaling_factor / latents_std; SD3's: (z - shift_factor) * scaling_factor.
    """
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        return config.scaling_factor, config.shift_factor or 0.0
    if mean is None or std is None or config.shift_factor:
        raise UserError(
            f"The config.json of the autoencoder {name!r} must give latents_mean and latents_std together and no "
            f"shift_factor, but gives {mean}, {std} and {config.shift_factor}: correct it."
        )
    is_whole = all(isinstance(x, list | tuple) and len(x) == config.latent_channels for x in (mean, std))
    if not (is_whole and all(map(_is_number, (*mean, *std))) and min(std) > 0):
        raise UserError(
            f"The config.json of the autoencoder {name!r} must give a latents_mean and a positive latents_std for each of "
            f"its {config.latent_channels} channels, but gives {mean!r:.80} and {std!r:.80}: correct it."
        )
    return tuple(config.scaling_factor / deviation for deviation in std), tuple(mean)


def load_diffusers(kind: str, name: str, source: str | Path, subfolder: str = "") -> Any:
    """The model of diffusers' class `kind`, in float32, with every tensor from the file.

    Args:
        kind: a class of diffusers, such as "AutoencoderKL".
        name: its name in messages.
        source: a local folder or the name of a hub repository.
        subfolder: its folder in `source`; a local folder may also be that subfolder itself.

    Raises:
        UserError: no such folder or repository, a damaged file, a model of another class, or tensors that do not fit.
    """
    diffusers = _diffusers()
    if not hasattr(diffusers, kind):
        raise UserError(
            f"The autoencoder {name!r} needs diffusers' {kind}, which diffusers {diffusers.__version__} lacks: install a newer version."
        )
    inside = f" of its folder {subfolder}" if subfolder else ""
    by_hand = f"give a folder with {CONFIG} and {WEIGHTS[0]}{inside} as --autoencoder-weights FOLDER"
    repository = Repository(f"autoencoder {name!r}", str(source), ((CONFIG,), WEIGHTS), by_hand, subfolder)
    if (folder := Path(source)).is_dir():
        folder = part if (part := folder / subfolder).is_dir() else folder
    elif folder.is_absolute() or str(source).startswith("."):  # cannot be a name on the hub
        raise UserError(f"There is no folder {source} for the autoencoder {name!r}: {by_hand}.")
    else:
        folder = repository.folder()
    config = repository.check(folder, (kind,), "_class_name")
    single, index = WEIGHTS[:2]
    # diffusers reads the parts; every other reader, and the check below, the single file
    if (folder / single).is_file() and (folder / index).is_file() and found_of((index,), folder) != [folder / single]:
        raise UserError(f"{folder} holds {single} and {index}, which may hold different weights: remove one of them.")
    # Several libraries read parts of the folder, each with its own errors.
    model_class = getattr(diffusers, kind)
    with faults.reading(folder, f"weights of the autoencoder {name!r}", damaged=(Exception,)):
        with no_larger_than(found_of(WEIGHTS, folder), folder / CONFIG):
            model_class.from_config(config)
        # float32, because results must not depend on the precision of the file or on the machine. Without low_cpu_mem_usage
        # diffusers needs no accelerate and prints no notice that it is missing.
        model, report = model_class.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False
        )
    # diffusers only warns about missing tensors and leaves them random.
    strays = [*report["missing_keys"], *report["unexpected_keys"]]
    if strays:
        raise UserError(f"{folder} does not fit its {CONFIG}, for example {strays[0]!r}: download or copy it again.")
    return model


def _diffusers() -> Any:
    diffusers = imports.need("diffusers", "An autoencoder of latents")
    try:
        diffusers.AutoencoderKL  # noqa: B018  triggers the import, because diffusers is lazy
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"diffusers cannot be imported ({reason}): remove a torchvision that was built for another version of torch."
        ) from error
    return diffusers
