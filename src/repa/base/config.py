"""Typed configuration: frozen pydantic models, read from and written to YAML, with one-sentence errors."""

import contextlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from repa.base.errors import UserError, choices
from repa.base.faults import require_plain
from repa.base.trust import contents_of

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)

MOST_BYTES = 2**17  # a configuration has some thousands; parsing more takes seconds
# type of a validation error -> what the value must be; other errors keep pydantic's words
NEEDED = {
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number, such as 8"),
    **dict.fromkeys(("float_parsing", "float_type"), "a number, such as 0.5"),
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "string_type": "a text",
    "dict_type": "a mapping",
}


@dataclass(frozen=True)
class OnDisk:
    """Marks a setting that names paths: a command reports a mistyped one by `require`, before it imports torch."""

    require: Callable[[Path], object]


class _Called(ModelMetaclass):
    """Makes TrainConfig(...) in Python raise the sentence of `Config.parse`, not pydantic's list of errors."""

    def __call__(cls, *values: Any, **settings: Any) -> Any:
        if values:
            name = cls.__name__
            raise UserError(
                f"{name} takes settings by name: write {name}(name=value), or {name}.load(path) for a file."
            )
        return cls.parse(settings)  # type: ignore[attr-defined]


class Config(BaseModel, metaclass=_Called):
    """Base of every configuration: frozen, without unknown keys; each field's docstring is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        for info in cls.model_fields.values():  # help pages wrap lines differently
            info.description = info.description and " ".join(info.description.split())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truths(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as numbers: pydantic would read them as 1 and 0, as Python does."""
        kind = cls.model_fields[str(info.field_name)].annotation
        kinds = {getattr(each, "__origin__", each) for each in (kind, *get_args(kind))}
        if kinds & {int, float} and bool not in kinds:
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, bool):
                    raise ValueError(f"expected a number, but got {str(each).lower()}")
        return value

    @classmethod
    def parse(cls, values: dict[str, Any], where: str = "", *, typed: bool = False) -> Self:
        """Validate a plain dictionary; raises UserError for the first mistake.

        `where`: the file with these settings; names of private code in it need `--trust` (base/trust.py).
        `typed`: the settings are command-line options, and the error names them as such.
        """
        try:
            with contents_of(where) if where else contextlib.nullcontext():
                return cls.model_validate(values)
        except ValidationError as error:
            sentence = explain(cls, error, typed)
            raise UserError(sentence if where in sentence else f"{where}: {sentence}") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file."""
        return cls.parse(read_yaml(path), where=str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def changed(self) -> list[str]:
        """Names of the settings that differ from the defaults."""
        return [name for name, info in type(self).model_fields.items() if getattr(self, name) != info.get_default()]

    def idle(self) -> dict[str, str]:
        """Settings without effect, given the others: dotted name -> reason, such as "without --compile"."""
        parts = {name: getattr(self, name) for name in type(self).model_fields}
        lists = {
            f"{name}.{i}": item
            for name, value in parts.items()
            if isinstance(value, tuple)
            for i, item in enumerate(value)
        }
        nested = {name: part for name, part in (parts | lists).items() if isinstance(part, Config)}
        return {
            f"{above}.{name}": why.replace("--", option(f"{above}."))  # an option of the part is one of the whole
            for above, part in nested.items()
            for name, why in part.idle().items()
        }

    def override(self, **changes: Any) -> Self:
        """A validated copy with some fields changed (model_copy would skip the checks)."""
        return type(self).parse({**self.model_dump(), **changes})


class _Loader(yaml.SafeLoader):
    """Strict YAML: duplicate keys, aliases and integers that are not decimal are errors."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # A few lines of nested aliases can expand to gigabytes.
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: write the value instead of an alias")
        return super().compose_node(parent, index)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    lines: dict[Any, int] = {}
    for key, _ in node.value:
        name, line = loader.construct_object(key, deep=True), key.start_mark.line + 1
        if not isinstance(name, (str, int, float, bool, type(None))):
            raise yaml.YAMLError(f"line {line}: a key must be a name, but is a {type(name).__name__}")
        if name in lines:
            raise yaml.YAMLError(
                f"the key {name!r} appears twice, in lines {lines[name]} and {line}: remove one of them"
            )
        lines[name] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # YAML 1.1 reads 010 as 8 and 1:30 as 90, which is never meant here; thousands of digits take quadratic time.
    if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)", node.value) or len(node.value) > 20:
        raise _not_decimal(node)
    return int(node.value)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    if set(node.value) & {":", "_"}:  # 1:30.5 would be 90.5
        raise _not_decimal(node)
    return float(yaml.SafeLoader.construct_yaml_float(loader, node))


def _not_decimal(node: yaml.ScalarNode) -> yaml.YAMLError:
    return yaml.YAMLError(
        f"line {node.start_mark.line + 1}: {node.value[:40]!r} is not a decimal number: write 8, not 010, 0x8, 1_000 or "
        "1:30, or quote a text"
    )


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def option(name: str) -> str:
    """A setting as an option: preview.num_images -> --preview.num-images."""
    return f"--{name.replace('_', '-')}"


def refuse_idle(idle: dict[str, str], given: Iterable[str]) -> None:
    """UserError for the first of the given settings that has no effect."""
    for name in given:
        if why := idle.get(name):
            raise UserError(f"{option(name)} has no effect {why}: leave it out.")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError for another file, or for duplicate keys."""
    path = Path(path)
    require_plain(path)
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise UserError(f"{path} is refused: a configuration has at most {MOST_BYTES:,} bytes. Give another file.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(f"There is no configuration file {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).replace(' in "<unicode string>",', " in").split())
        raise UserError(f"{path} cannot be read as YAML: {reason}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of settings, but holds {type(values).__name__}.")
    return values


def explain(model: type[BaseModel], error: ValidationError, typed: bool = False) -> str:
    """The first validation error as a sentence: field, given value, allowed values, nearest name.

    `typed`: name the field as an option, --alignments.0.depth.
    """
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    name = _typed(model, first["loc"]) if typed else field
    shown = name if typed else f"setting {field!r}"
    if first["type"] == "extra_forbidden":
        allowed = _fields_at(model, first["loc"][:-1])
        return f"unknown setting {field!r}{choices(str(first['loc'][-1]), allowed)}"
    if first["type"] == "missing":
        return f"{shown} is missing."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        message += "" if message.endswith((".", "?", "!")) else "."
        return f"{name}: {message}" if field else message
    return f"{shown} is {repr(first['input'])[:200]}{must_be(error)}."


def must_be(error: ValidationError) -> str:
    """The end of the sentence about the first wrong value: ', but must be at least 1'."""
    first = error.errors(include_url=False)[0]
    if needed := NEEDED.get(first["type"]):
        return f", but must be {needed.format(**first.get('ctx', {}))}"
    return f": {first['msg'][:1].lower()}{first['msg'][1:]}"


def _typed(model: type[BaseModel], location: tuple) -> str:
    """The option for a location in a configuration; entries of a list have a number only if they have options of their own."""
    inside: type[BaseModel] | None = model
    names: list[str] = []
    for part in location:
        if isinstance(part, str):
            info = inside.model_fields.get(part) if inside else None
            inside = _model_in(info.annotation) if info else None
        if isinstance(part, str) or inside:
            names.append(str(part))
    return option(".".join(names))


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    """Field names of the nested model at the location of a validation error."""
    current: Any = model
    for part in location:
        if part in current.model_fields:  # else a number of a list, or a key of a dictionary
            current = _model_in(current.model_fields[part].annotation) or current
    return list(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as tuple[Model, ...] or dict[str, Model]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in getattr(annotation, "__args__", ()) if (found := _model_in(a))), None)


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.learning_rate": 1e-4}: mappings and lists of mappings are flattened; any other list is one value."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for key, item in items for k, v in leaves(item, f"{prefix}.{key}" if prefix else str(key)).items()}


def difference(old: Config, new: Config) -> list[str]:
    """Lines 'field: old -> new' for every differing value."""

    a, b = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    missing = "(none)"
    return [
        f"{k}: {a.get(k, missing)} -> {b.get(k, missing)}"
        for k in sorted({*a, *b})
        if a.get(k, missing) != b.get(k, missing)
    ]
