"""Packages that only a part of repa needs: a missing one is answered with the line to type."""

import importlib
import importlib.util
from types import ModuleType

from repa.base.errors import UserError


def need(package: str, extra: str, why: str) -> ModuleType:
    """Import `package`, which `pip install "repa[extra]"` brings.

    Args:
        package: its import name.
        extra: of pyproject.toml.
        why: what needs it, the beginning of the message's sentence: "The encoder dinov2-b".

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package.partition(".")[0]:
            raise  # it is installed, and misses something itself
        raise missing(package, extra, why) from error


def missing(package: str, extra: str, why: str) -> UserError:
    """What is said when `package` is not installed."""
    return UserError(f'{why} needs the package {package.partition(".")[0]}: pip install "repa[{extra}]"')
