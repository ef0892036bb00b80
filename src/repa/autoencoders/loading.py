"""Models of diffusers from a folder or the hub, whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from repa.base import extras, trust
from repa.base.errors import UserError


def load_diffusers(kind: str, name: str, source: str | Path, subfolder: str = "") -> Any:
    """The model of diffusers' class `kind`, in float32, every tensor of it from its file.

    Args:
        kind: a class of diffusers, such as "AutoencoderKL".
        name: what to call it in messages.
        source: a local folder or the name of a hub repository.
        subfolder: where it lies in `source`; a local folder may also be that subfolder itself.

    Raises:
        UserError: no such folder or repository, a damaged file, a model of another class, tensors that do not fit.
    """
    diffusers = _diffusers()
    if not hasattr(diffusers, kind):
        raise UserError(
            f"The autoencoder {name!r} is diffusers' {kind}, which diffusers {diffusers.__version__} does not have: install a newer one."
        )
    local = Path(source).is_dir()
    if not local and (Path(source).is_absolute() or str(source).startswith(".")):  # which no name on the hub is
        raise UserError(
            f"The autoencoder {name!r} cannot be loaded: there is no folder {source}. Give one with config.json and "
            "diffusion_pytorch_model.safetensors as --autoencoder-weights FOLDER."
        )
    if local:
        inside = Path(source) / subfolder
        source, subfolder = inside if inside.is_dir() else source, ""
    where = {"local_files_only": local, "subfolder": subfolder or None}
    # Many are stored in half precision: what is computed must not depend on that, nor on the machine. Without the option for
    # little memory diffusers needs no accelerate, and prints no notice that it is absent.
    options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
    try:
        config = diffusers.AutoencoderKL.load_config(str(source), **where)
        trust.require_plain_model(config, f"config.json of {source}")
        found = config.get("_class_name", kind)
        if found != kind:
            raise UserError(f"The autoencoder {name!r} is a {kind}, but {source} holds a {found}: name other weights.")
        model, report = getattr(diffusers, kind).from_pretrained(
            str(source), output_loading_info=True, **where, **options
        )
    except UserError:
        raise
    # Several libraries read a part of it, each with errors of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(_not_loaded(name, source, subfolder, local, reason)) from error
    # diffusers only warns, and leaves missing tensors random.
    strays = [*report["missing_keys"], *report["unexpected_keys"]]
    if strays:
        reason = f"its weights do not fit, for example {strays[0]!r}"
        raise UserError(_not_loaded(name, source, subfolder, local, reason))
    return model


def _diffusers() -> Any:
    diffusers = extras.need("diffusers", "An autoencoder of latents")
    try:
        diffusers.AutoencoderKL  # noqa: B018  the import proper: diffusers is lazy
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"diffusers cannot be imported ({reason}): remove a torchvision built for another torch."
        ) from error
    return diffusers


def _not_loaded(name: str, source: str | Path, subfolder: str, local: bool, reason: str) -> str:
    if local:
        return f"The autoencoder {name!r} cannot be loaded from the folder {source}: {reason}."
    return (
        f"The autoencoder {name!r} cannot be loaded: {source} is neither a folder here nor on the hub of "
        f"Hugging Face or in its cache. Where there is a network, accept its licence if it asks for that, download "
        f"config.json and diffusion_pytorch_model.safetensors{f' of its folder {subfolder}' if subfolder else ''}, "
        f"and give that folder as --autoencoder-weights FOLDER. "
        f"(The hub's client said: {reason})"
    )
