"""Public names of a room without importing what they need until they are used (PEP 562)."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def exports(
    package: str, local: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Module-level `__getattr__`, `__dir__`, `__all__` for a room's `__init__.py`.

    The names are those that the file imports under `if TYPE_CHECKING:`, where editors and type checkers look for them:
    `from package.module import Name as Name`. `from package import room as room` makes a submodule an attribute, as
    after `import package.room`; `__all__` leaves it out.

    Args:
        package: the room's `__name__`.
        local: public names defined in `__init__.py` itself (registries).
    """
    where = {alias.asname: statement.module for statement in _imports(package) for alias in statement.names}
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


def _imports(package: str) -> Iterator[ast.ImportFrom]:
    """The imports under `if TYPE_CHECKING:` in a package's own file."""
    source = sys.modules[package].__spec__.loader.get_source(package)
    for block in ast.parse(source).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            yield from block.body
