"""Components chosen by a spec string: `name`, `name:key=value,key=value`, or a dotted `package.module.attr[:...]` for private code."""

import ast
import functools
import importlib
import importlib.util
import inspect
from pathlib import Path
from typing import Any

from repa.base.errors import UserError, nearest


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """'nt_xent:temperature=0.07' -> ('nt_xent', {'temperature': 0.07}). Values are Python literals, else plain text."""
    name, _, rest = spec.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise UserError(
                f"{spec!r} cannot be read: settings are written name:key=value,key=value, but got {item!r}."
            )
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            settings[key.strip()] = {"true": True, "false": False}.get(value.strip().lower(), value.strip())
    return name.strip(), settings


class Registry:
    """A table of names to `"module:attr"`, imported only when built.

    Functions are returned with the spec's settings bound; classes are instantiated with them.
    """

    def __init__(self, kind: str, table: dict[str, str]):
        self.kind = kind
        self.table = table

    def names(self) -> list[str]:
        return sorted(self.table)

    def target(self, spec: str) -> str:
        """The "module:attr" that a spec names; raises UserError with the nearest name when there is none."""
        name, _ = parse_spec(spec)
        if name in self.table:
            return self.table[name]
        if "." in name:
            return ":".join(name.rsplit(".", 1))
        raise UserError(
            f"Unknown {self.kind} {name!r}: allowed are {', '.join(self.names())}.{nearest(name, self.table)}"
        )

    def check(self, spec: str) -> str:
        """Validate name and settings of a spec without importing anything heavy; returns the spec."""
        name, settings = parse_spec(spec)
        target = self.target(spec)
        if name in self.table:
            self._check_settings(spec, settings, _keyword_settings(target))
        return spec

    def build(self, spec: str) -> Any:
        """The object a spec names: a function with its settings bound, or an instance of a class."""
        name, settings = parse_spec(spec)
        module, attr = self.target(spec).split(":")
        try:
            component = getattr(importlib.import_module(module), attr)
        except (ModuleNotFoundError, AttributeError) as error:
            if name in self.table:
                raise
            raise UserError(f"The {self.kind} {name!r} cannot be imported: {error}.") from error
        if inspect.isclass(component):
            return component(**settings)
        if settings:
            self._check_settings(spec, settings, set(inspect.signature(component).parameters))
            return functools.partial(component, **settings)
        return component

    def _check_settings(self, spec: str, settings: dict, allowed: set[str]) -> None:
        for key in settings:
            if key not in allowed:
                raise UserError(
                    f"The {self.kind} {spec!r} has no setting {key!r}: allowed are "
                    f"{', '.join(sorted(allowed)) or 'none'}.{nearest(key, allowed)}"
                )


@functools.cache
def _keyword_settings(target: str) -> set[str]:
    """Names of the keyword settings of `module:attr`, read from its source: a configuration is checked without importing torch."""
    module, attr = target.split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"registry points to {module}, which does not exist"
    for node in ast.parse(Path(str(spec.origin)).read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == attr:
            init = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            fields = {
                f.target.id for f in node.body if isinstance(f, ast.AnnAssign)
            }  # a dataclass has no written __init__
            return _settings_of(init[0]) if init else fields
        if isinstance(node, ast.FunctionDef) and node.name == attr:
            return _settings_of(node)
    raise AssertionError(f"registry points to {target}, which does not exist")


def _settings_of(function: ast.FunctionDef) -> set[str]:
    """Keyword-only arguments: what is positional is given by the caller, not by a spec string."""
    return {argument.arg for argument in function.args.kwonlyargs}
