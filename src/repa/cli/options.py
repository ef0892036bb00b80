"""Command line -> configuration. Pydantic checks the values, so a mistake here reads like a mistake in a YAML file.

tyro draws the help pages; it does not parse, because its errors are boxes and ours are one sentence.
"""

import sys
import typing
from typing import Any, TypeVar

from pydantic import BaseModel

from repa.base.config import Config
from repa.base.errors import UserError, nearest

C = TypeVar("C", bound=Config)


def parse(
    cls: type[C],
    argv: list[str],
    *,
    verb: str,
    about: str,
    positional: tuple[str, ...] = (),
    values: Config | None = None,
) -> C:
    """The configuration that the arguments of a verb describe.

    Args:
        positional: names of fields given without a flag, in order; a name ending in "..." takes all that are left.
        values: a configuration whose values are the defaults, in place of the class's own.
    """
    start = {} if values is None else values.model_dump()
    if "-h" in argv or "--help" in argv:
        print_help(cls, verb, about, positional, values)
        sys.exit(0)
    words, flags = _split(argv)
    for flag, given in flags:
        words += _set(cls, start, flag, given, verb)
    _place(start, words, positional, verb)
    for name, info in cls.model_fields.items():
        if info.is_required() and name not in start:
            shown = name if name in [p.rstrip(".") for p in positional] else f"--{name.replace('_', '-')}"
            raise UserError(f"`repa {verb}` needs {shown} ({info.description}): see `repa {verb} --help`.")
    return cls.parse(start)


def part(cls: type[C], given: Config) -> C:
    """The fields of `cls` out of the arguments that extend it."""
    return cls.parse({name: value for name, value in given.model_dump().items() if name in cls.model_fields})


def print_help(cls: type[Config], verb: str, about: str, positional: tuple[str, ...], values: Config | None) -> None:
    import tyro

    names = " ".join(name.upper() for name in positional)
    given = {name: info.default if not info.is_required() else tyro.MISSING for name, info in cls.model_fields.items()}
    if values is not None:
        given |= {name: getattr(values, name) for name in type(values).model_fields}
    tyro.cli(
        cls, args=["--help"], prog=f"repa {verb} {names}".rstrip(), description=about, default=cls.model_construct(**given),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )  # fmt: skip


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Leading words, then (flag, the words up to the next flag)."""
    words: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif token.startswith("-") and not token.lstrip("-").replace(".", "", 1)[:1].isdigit():
            raise UserError(f"{token!r} is no option: options start with two dashes.")
        elif flags:
            flags[-1][1].append(token)
        else:
            words.append(token)
    return words, flags


def _place(values: dict[str, Any], words: list[str], positional: tuple[str, ...], verb: str) -> None:
    for name in positional:
        if name.endswith("..."):
            if words:
                values[name.rstrip(".")] = words
            return
        if words:
            values[name] = words.pop(0)
    if words:
        raise UserError(f"`repa {verb}` does not know what to do with {words[0]!r}: see `repa {verb} --help`.")


def _set(cls: type[BaseModel], values: dict[str, Any], flag: str, given: list[str], verb: str) -> list[str]:
    """Put the value of one flag where its dotted name points; returns the words after it that are not its own."""
    parts = flag.replace("-", "_").split(".")
    owner: Any = values
    annotation: Any = cls
    for depth, part in enumerate(parts):
        if _is_model(annotation):
            fields = annotation.model_fields
            if part not in fields:
                near = nearest(part, fields).replace("_", "-")
                names = ", ".join("--" + ".".join([*parts[:depth], n]).replace("_", "-") for n in fields)
                raise UserError(f"`repa {verb}` has no option --{flag}: allowed here are {names}.{near}")
            key: Any = part
            annotation = fields[part].annotation
        elif (item := _item_model(annotation)) and part.isdigit():
            key, annotation = int(part), item
            if key > len(owner):
                raise UserError(f"--{flag}: there are {len(owner)} entries, so the next one is number {len(owner)}.")
            if key == len(owner):
                owner.append({})
        else:
            raise UserError(f"`repa {verb}` has no option --{flag}: {'.'.join(parts[:depth])} has no part {part!r}.")
        if depth + 1 < len(parts):
            if isinstance(owner, dict):
                empty = [] if typing.get_origin(annotation) is tuple else {}
                nested = owner.get(key, empty)
                owner[key] = list(nested) if isinstance(nested, tuple) else nested
            owner = owner[key]
    if typing.get_origin(annotation) is tuple:
        owner[key] = given
        return []
    if annotation is bool and (not given or given[0].lower() not in ("true", "false")):
        owner[key] = True
        return given
    if not given:
        raise UserError(f"--{flag} needs a value: see `repa {verb} --help`.")
    owner[key] = given[0]
    return given[1:]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _item_model(annotation: Any) -> Any:
    arguments = typing.get_args(annotation)
    return arguments[0] if typing.get_origin(annotation) is tuple and arguments and _is_model(arguments[0]) else None
