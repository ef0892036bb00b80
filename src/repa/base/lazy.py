"""Lazy public names of a room: imported on first use (PEP 562)."""

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


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
