"""Components chosen by a spec string: `name`, `name:key=value,key=value`, or a dotted `package.module.attr[:...]` for private code."""

import ast
import contextlib
import functools
import html
import importlib
import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from repa.base.config import must_be
from repa.base.errors import UserError, choices, listed, nearest, require_type
from repa.base.trust import DOTTED, SETTING, current_folder, require_origin, require_trusted

# The names, besides built-in types, that settings of registered functions may be annotated with.
ANNOTATIONS = {"Annotated": Annotated, "Literal": Literal, **{
    name: getattr(pydantic, name)
    for name in ("Field", "PositiveInt", "PositiveFloat", "NonNegativeInt", "NonNegativeFloat")
}}  # fmt: skip
VALUES = ConfigDict(strict=True, allow_inf_nan=False)  # true is not a number, and 3.0 is not an integer


class Setting(NamedTuple):
    """The declaration of one setting of a function or class."""

    annotation: Any
    """The type of its values; Any in private code, which checks its values itself."""
    is_required: bool
    default: str = ""
    """Its value if it is left out, as in the source; "" if it is required, or of private code."""


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """'nt_xent:temperature=0.07' -> ('nt_xent', {'temperature': 0.07}). Values are Python literals, else plain text."""
    require_type(spec, str, "A name is a text such as 'cosine' or 'cfg:scale=1.5'")
    name, _, rest = spec.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not (equals and key.strip().isidentifier()):
            raise UserError(
                f"{spec!r} cannot be read: settings are written name:key=value,key=value, but got {item!r}."
            )
        key = key.strip()
        if key in settings:
            raise UserError(f"{spec!r:.200} has the setting {key!r} twice: remove one.")
        try:
            settings[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
            settings[key] = {"true": True, "false": False}.get(value.strip().lower(), value.strip())
    return name.strip(), settings


class Registry:
    """A table of names to `"module:attr"`, imported only when built.

    Functions are returned with the spec's settings bound; classes are instantiated with them.
    """

    def __init__(
        self, kind: str, table: dict[str, str], base: str = "", listing: str = "", facts: dict[str, str] | None = None,
        takes: Sequence[str] = (), takes_named: Sequence[str] = (),
    ):  # fmt: skip
        """
        Args:
            kind: the noun for one entry, for errors.
            table: name -> "module:attr".
            base: the class that a dotted name may refer to instead of a function: "module:attr", or "callable" for any
                class with callable instances.
            listing: the word after `repa list` that prints the names.
            facts: name -> description, for entries that share a function.
            takes: the arguments that a function is called with, to refuse private code with others. Empty: not checked.
            takes_named: those of them that are passed by name.
        """
        self.kind, self.table, self.base, self.listing, self.facts = kind, table, base, listing, facts or {}
        self.takes, self.takes_named = takes, takes_named

    def __repr__(self) -> str:
        return f"{self.kind}: {', '.join(self.names())}"

    def _repr_html_(self) -> str:
        """For notebooks: a table of the names and their settings."""
        rows = []
        for name in self.names():
            settings = ", ".join(self.settings(name)) or "no settings"
            rows.append(f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(settings)}</td></tr>")
        return f"<p>{html.escape(self.kind)}</p><table>{''.join(rows)}</table>"

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        return sorted(self.table)

    def about(self, name: str) -> str:
        """A one-sentence description: from `facts`, or the first line of the docstring."""
        return self.facts.get(name) or self.docstring(name).partition("\n")[0]

    def docstring(self, name: str) -> str:
        """The docstring of an entry, read from its source without an import."""
        return ast.get_docstring(_definition(self.table[name])) or ""

    def settings(self, name: str) -> dict[str, str]:
        """Settings of an entry -> default, "..." if it has none: required ones first."""
        found = _keyword_settings(self.table[name])
        return {
            key: found[key].default or "..." for key in sorted(found, key=lambda key: (bool(found[key].default), key))
        }

    def target(self, spec: str) -> str:
        """The "module:attr" that a spec names; UserError for an unknown name."""
        name, _ = parse_spec(spec)
        if name in self.table:
            return self.table[name]
        if DOTTED.fullmatch(name):
            require_trusted(self.kind, name)
            return ":".join(name.rsplit(".", 1))
        raise UserError(
            f"Unknown {self.kind} {name!r}{choices(name, self.names(), self.listing and f'repa list {self.listing}')}"
        )

    def check(self, spec: str) -> str:
        """Validate the name and the settings of a spec without importing torch; returns the spec."""
        name, settings = parse_spec(spec)
        target = self.target(spec)
        if name in self.table:
            check_settings(self.kind, spec, settings, _keyword_settings(target))
        return spec

    def build(self, spec: str) -> Any:
        """The object of a spec: a function with its settings bound, or an instance of a class."""
        name, settings = parse_spec(spec)
        component = self.load(spec)
        check_settings(self.kind, spec, settings, settings_of(component, is_ours=name in self.table))
        if inspect.isclass(component):
            return component(**settings)
        return functools.partial(component, **settings) if settings else component

    def load(self, spec: str) -> Any:
        """The function or class that a spec names, imported."""
        name, _ = parse_spec(spec)
        module, attr = self.target(spec).split(":")
        try:
            with contextlib.nullcontext() if name in self.table else current_folder():
                component = getattr(importlib.import_module(module), attr)
        except (ModuleNotFoundError, AttributeError) as error:
            if name in self.table:
                raise
            raise UserError(f"The {self.kind} {name!r} cannot be imported: {error}.") from error
        if name not in self.table:
            self._check_kind(name, component)
            require_origin(self.kind, name, component)
        return component

    def instance(self, spec: str, value: Any, kind: type) -> Any:
        """`value`, which the function of a spec returned; UserError if it is of another class than `kind`."""
        if not isinstance(value, kind):
            given = type(value).__name__
            raise UserError(
                f"The {self.kind} {spec!r} must return an instance of {kind.__name__}, but returned {given}."
            )
        return value

    def returned(self, spec: str, value: Any, shape: Sequence[int], what: str) -> Any:
        """`value`, which the function of a spec returned; UserError for another shape: it might be broadcast."""
        given = getattr(value, "shape", () if isinstance(value, int | float) else None)
        if given is None or tuple(given) != tuple(shape):
            found = type(value).__name__ if given is None else tuple(given)
            wanted = f"{what} of shape {tuple(shape)}" if shape else what
            raise UserError(f"The {self.kind} {spec!r} must return {wanted}, but returned {found}.")
        return value

    def _check_kind(self, name: str, component: Any) -> None:
        """Refuse the object of a dotted name, before it is called, unless it is a function or a class of this kind."""
        module, _, attr = self.base.partition(":")
        kind = getattr(importlib.import_module(module), attr) if attr else None
        # Only a class can fulfil a protocol, not a function that returns an instance.
        protocol = getattr(kind, "_is_protocol", False)
        if inspect.isfunction(component) and not protocol:
            self._check_arguments(name, component, self.takes, self.takes_named)
            return
        if inspect.isclass(component):
            if module == "callable" and any("__call__" in vars(each) for each in component.__mro__):
                takes = self.takes and ("self", *self.takes)
                self._check_arguments(f"{name}.__call__", component.__call__, takes, self.takes_named)
                return
            if kind and issubclass(component, kind):
                for method in [each for each in vars(kind) if protocol and not each.startswith("_")]:
                    own = [*inspect.signature(getattr(kind, method)).parameters]
                    self._check_arguments(f"{name}.{method}", getattr(component, method), own)
                return
        dotted = self.base.replace(":", ".")
        wanted = {"": "a function", "callable": "a function or a class whose instances are called"}.get(
            self.base, f"a class with the methods of {dotted}" if protocol else f"a function or a {dotted}"
        )
        raise UserError(
            f"The {self.kind} {name!r} must be {wanted}, but is {type(component).__name__} {component!r:.80}."
        )

    def _check_arguments(self, name: str, function: Any, takes: Sequence[str], named: Sequence[str] = ()) -> None:
        """Refuse a function that cannot be called with `takes` by position and `named` by name; without `takes`, none."""
        if not takes:
            return
        signature = inspect.signature(function)
        # required settings have their own check
        required = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        try:
            signature.bind(*takes, **dict.fromkeys((*required, *named)))
        except TypeError:
            raise UserError(
                f"The {self.kind} {name!r} takes {signature}, but is called with ({', '.join((*takes, *named))}): change "
                "its arguments, and put your own settings after *."
            ) from None


def check_settings(kind: str, spec: str, given: dict[str, Any], known: dict[str, Setting]) -> None:
    """UserError for missing settings, unknown settings and invalid values."""
    if SETTING in known.keys() & given.keys():  # private code inside a spec of ours
        inner = str(given[SETTING])
        if not DOTTED.fullmatch(inner):
            raise UserError(f"{SETTING} of {spec!r} must be a dotted name of a function, such as mylab.nets.unet.")
        require_trusted(kind, inner)
    for key, value in given.items():
        if key not in known:
            raise UserError(f"The {kind} {spec!r} has no setting {key!r}{choices(key, sorted(known))}")
        try:
            # A text may look like a number, such as a folder named 2024.
            checked = str(value) if known[key].annotation is str else value
            TypeAdapter(known[key].annotation, config=VALUES).validate_python(checked)
        except ValidationError as error:
            raise UserError(f"The setting {key!r} of the {kind} {spec!r} is {value!r}{must_be(error)}.") from None
    # last, because a misspelt setting is missing too
    if missing := sorted(key for key, setting in known.items() if setting.is_required and key not in given):
        name, _ = parse_spec(spec)
        raise UserError(f"The {kind} {spec!r} needs {', '.join(missing)}: write {name}:{'=..., '.join(missing)}=...")


def declared(component: Any, name: str) -> Any:
    """An attribute of a function or class, whether its settings are bound or not; None if it has no such attribute."""
    return getattr(getattr(component, "func", component), name, None)


def Spec(registry: Registry, also: tuple[str, ...] = ()) -> AfterValidator:
    """Validator of a spec in a configuration: `loss: Annotated[str, Spec(LOSSES)]`. `also`: other allowed texts."""

    return AfterValidator(functools.partial(_checked, registry, also))


def _checked(registry: Registry, also: tuple[str, ...], text: str) -> str:
    if text in also:
        return text
    try:
        return registry.check(text)
    except UserError as error:
        others = [other for other in also if other]
        if not others or "." in text:
            raise
        raise UserError(f"{error} Also allowed: {listed(others)}.{nearest(text, also)}") from None


def settings_of(component: Any, *, is_ours: bool) -> dict[str, Setting]:
    """The settings of an imported function or class."""
    # Positional parameters of a function are passed by its caller. A class has no other caller than the registry.
    kinds = [inspect.Parameter.KEYWORD_ONLY, *[inspect.Parameter.POSITIONAL_OR_KEYWORD] * inspect.isclass(component)]
    parameters = [p for p in inspect.signature(component).parameters.values() if p.kind in kinds]
    return {
        p.name: Setting(p.annotation if is_ours and p.annotation is not p.empty else Any, p.default is p.empty)
        for p in parameters
    }


# Read from the source, because inspect.signature would import the module and torch, and configurations are checked without torch.
@functools.cache
def _keyword_settings(target: str) -> dict[str, Setting]:
    """The settings of a registered "module:attr", read from its source without an import."""
    node = _definition(target)
    if isinstance(node, ast.ClassDef):
        init = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
        node = init[0] if init else node
    named: list[tuple[str, ast.expr | None, ast.expr | None]]
    if isinstance(node, ast.FunctionDef):
        arguments = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        named = [(a.arg, a.annotation, default) for a, default in arguments]
    else:  # a dataclass has no written __init__
        fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
        named = [(f.target.id, f.annotation, f.value) for f in fields if isinstance(f.target, ast.Name)]
    return {
        name: Setting(
            eval(ast.unparse(kind), ANNOTATIONS) if kind else Any,
            default is None,
            ast.unparse(default).strip("'") if default else "",
        )
        for name, kind, default in named
    }


def _definition(target: str) -> ast.ClassDef | ast.FunctionDef:
    """The syntax tree of "module:attr"."""
    module, attr = target.split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"registry points to {module}, which does not exist"
    for node in ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == attr:
            return node
    raise AssertionError(f"registry points to {target}, which does not exist")
