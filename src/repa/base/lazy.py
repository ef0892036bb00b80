"""Public names of a room without importing what they need until they are used (PEP 562)."""

import importlib
import sys


def exports(package: str, where: dict[str, str], local: tuple[str, ...] = (), rooms: tuple[str, ...] = ()):
    """Module-level `__getattr__`, `__dir__`, `__all__` for a room's `__init__.py`.

    Args:
        package: the room's `__name__`.
        where: public name -> submodule that defines it.
        local: public names defined in `__init__.py` itself (registries).
        rooms: submodules that are there as attributes, too, as after `import package.room`.
    """

    def __getattr__(name: str):
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    names = sorted([*where, *local])
    return __getattr__, lambda: sorted([*names, *rooms]), names
