"""Command line -> configuration. Pydantic checks the values, so errors read as those of a YAML file.

tyro prints the help pages. It does not parse, because it prints errors in boxes.
"""

import contextlib
import io
import os
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeGuard, TypeVar, cast

from pydantic import BaseModel, Field

from repa.base import files, launch
from repa.base.config import Config, OnDisk, option, refuse_idle
from repa.base.errors import UserError, nearest
from repa.data.manifest import require_data
from repa.data.remote import is_url
from repa.runs import layout

HELP = ("-h", "--help")
TRUTHS = ("true", "false", "yes", "no", "on", "off")  # values of a switch; any other word is not its value


class Command(Config):
    """The options of a verb. Its docstring is the description in `--help`."""

    verb: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    """Names of positional fields, in order; a name ending in "..." takes all remaining words."""


def _require_images(path: Path) -> None:
    from repa.data.sources.opening import require_source

    if not path.exists():
        require_source(str(path))


DataFolder = Annotated[str, OnDisk(require_data)]
RunFolder = Annotated[str, OnDisk(layout.require_run)]
RunFolders = Annotated[tuple[str, ...], OnDisk(layout.require_run)]
AnyPath = Annotated[str, OnDisk(files.require_path)]
Images = Annotated[str, OnDisk(_require_images)]

C = TypeVar("C", bound=Config)
V = TypeVar("V", bound=Command)


class WeightsOfRun(Command):
    """Options of verbs that read runs."""

    weights: str = "ema"
    """Averaged weights (ema), raw weights (model), or another average by name, such as ema-width-0.1 of `repa ema`."""
    autoencoder_weights: str = ""
    """Location of the weights of the run's autoencoder; empty: the recorded location, otherwise the hub's."""


class OneCheckpoint(Command):
    """Options of verbs that read one checkpoint."""

    checkpoint: int = Field(-1, ge=-1)
    """Step of the checkpoint; -1: the newest."""

    @property
    def step(self) -> int | None:
        """The step, or None for the newest checkpoint."""
        return None if self.checkpoint < 0 else self.checkpoint


class CheckpointOfRun(WeightsOfRun, OneCheckpoint):
    """Options of verbs that read the network of one checkpoint."""


def parse(cls: type[V], argv: list[str], values: Config | None = None, *, on_disk: bool = True) -> V:
    """The configuration that the arguments of a verb describe; `values` replace the defaults of the class.

    A mistyped path is reported here, before torch is imported; without `on_disk` paths need not exist.
    """
    start = {} if values is None else values.model_dump()
    if set(HELP) & set(argv):
        print_help(cls, values)
        sys.exit(0)
    words, settings = _read(cls, argv)
    before: set[str] = set()
    for flag, value in settings:
        _store(start, flag, value, again=flag in before)
        before.add(flag)
    _place(start, words, cls)
    for name, info in cls.model_fields.items():
        given = start.get(name, "")
        # an empty path, as of a variable of the shell that is not set, would mean the current folder
        if info.is_required() and (given == "" or (isinstance(given, list) and "" in given)):
            shown = name.upper() if name in [p.rstrip(".") for p in cls.positional] else option(name)
            raise UserError(
                f"`repa {cls.verb}` needs {shown} ({str(info.description).rstrip('.')}): see `repa {cls.verb} --help`."
            )
    arguments = cls.parse(start, typed=True)
    if on_disk:
        _require_on_disk(arguments)
    # Only typed options: a recipe may hold settings that another option makes ineffective.
    refuse_idle(arguments.idle(), [".".join(_parts(flag)) for flag, _ in settings])
    return arguments


def _require_on_disk(given: Command) -> None:
    # Several processes first meet, because a folder may be missing on one machine only.
    if launch.place().world > 1:
        return
    for name, info in type(given).model_fields.items():
        for mark in [mark for mark in info.metadata if isinstance(mark, OnDisk)]:
            value = getattr(given, name)
            for path in [value] if isinstance(value, str) else value:
                if path and not is_url(path):
                    mark.require(Path(path))


def names_given(cls: type[Command], argv: list[str]) -> list[str]:
    """Dotted names of the settings in the arguments of a verb, for checks that need its files."""
    return [".".join(_parts(flag)) for flag, _ in _read(cls, argv)[1]]


def first(cls: type[Command], argv: list[str], name: str) -> str | None:
    """The value of the first positional field `name`, as a word or by its flag: a recipe is needed before the other options."""
    words, settings = _read(cls, argv)
    flagged = [value for flag, value in settings if flag == name]
    return next(iter(flagged + words), None)


def part(cls: type[C], given: Config) -> C:
    """The part of the arguments that are fields of `cls`."""
    return cls.parse({name: value for name, value in given.model_dump().items() if name in cls.model_fields})


def file_of(flag: str, path: str | Path, suffix: str) -> Path:
    """The file that an option names; UserError for another suffix."""
    if Path(path).suffix != suffix:
        raise UserError(f"{flag} is {path}, which does not end in {suffix}: give another name.")
    return Path(path)


def print_help(cls: type[Command], values: Config | None) -> None:
    import tyro

    def defaults(model: type[BaseModel]) -> dict[str, Any]:
        return {n: tyro.MISSING if info.is_required() else info.default for n, info in model.model_fields.items()}

    given = defaults(cls)
    if values is not None:
        given |= {name: getattr(values, name) for name in type(values).model_fields}
    for name, info in cls.model_fields.items():
        # If a run has no alignments or streams, show the options of a first one; otherwise nobody would find them.
        if (item := item_model(info.annotation)) and not given[name]:
            given[name] = (item.model_construct(**defaults(item)),)
    # Required options come first.
    ordered = cast("type[Config]", type(cls.__name__, (cls,), {"__doc__": cls.__doc__}))
    ordered.__pydantic_fields__ = dict(sorted(cls.model_fields.items(), key=lambda field: not field[1].is_required()))
    for name in [name for name, info in cls.model_fields.items() if typing.get_origin(info.annotation) is dict]:
        # tyro would show an option for each entry of a mapping.
        ordered.__annotations__[name] = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[ENCODER=VALUE ...]")]
        given[name] = tuple(map("=".join, given[name].items()))
    page = _Page()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(page):
        tyro.cli(
            ordered, args=["--help"], description=" ".join(str(cls.__doc__).split()),
            default=ordered.model_construct(**given), config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )  # fmt: skip
    # The first paragraph is tyro's usage, which lacks positional words.
    about, _, tables = page.getvalue().partition("\n\n")[2].partition("\n\n")
    about = textwrap.fill(about, shutil.get_terminal_size().columns, break_long_words=False, break_on_hyphens=False)
    # tyro's parser requires one of the two; here a switch may be alone or followed by true or false.
    print(usage(cls), about, tables.replace("{True,False}", "[true|false]"), sep="\n\n", end="")


class _Page(io.StringIO):
    """The stream that tyro prints to. tyro ignores NO_COLOR on a terminal, so this is not a terminal if NO_COLOR is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def isatty(self) -> bool:
        return self.is_coloured


def usage(cls: type[Command]) -> str:
    """The positional words of a verb and its required options: "usage: repa train RECIPE --data DATA --out OUT [--OPTION VALUE ...]"."""
    words = [name.rstrip(".") for name in cls.positional]
    is_needed = {name: info.is_required() for name, info in cls.model_fields.items()}
    shown = [
        name.upper() if is_needed[word] else f"[{name.upper()}]"
        for name, word in zip(cls.positional, words, strict=True)
    ]
    needed = [f"{option(name)} {name.upper()}" for name in is_needed if is_needed[name] and name not in words]
    return " ".join(["usage: repa", cls.verb, *shown, *needed, "[--OPTION VALUE ...]"])


def _read(cls: type[Command], argv: list[str]) -> tuple[list[str], list[tuple[str, Any]]]:
    """Positional words, and (flag, value) for every flag; the types of the fields determine the number of words of a flag."""
    words, flags = _split(argv)
    settings = []
    for flag, given in flags:
        value, rest = _take(flag, annotation(cls, flag), given, cls.verb)
        settings.append((flag, value))
        words += rest
    return words, settings


def _split(argv: list[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Leading words, then (flag, the words up to the next flag)."""
    words: list[str] = []
    flags: list[tuple[str, list[str]]] = []
    for token in argv:
        if token in HELP:
            continue
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token[2:].partition("=")
            flags.append((name, [value] if equals else []))
        elif token.startswith("-") and not token.lstrip("-").replace(".", "", 1)[:1].isdigit():
            raise UserError(f"{token!r} is not an option: write options with two dashes.")
        elif flags:
            flags[-1][1].append(token)
        else:
            words.append(token)
    return words, flags


def _place(values: dict[str, Any], words: list[str], cls: type[Command]) -> None:
    for name in cls.positional:
        if name.endswith("..."):
            if words:
                values[name.rstrip(".")] = words
            return
        if words and name not in values:
            values[name] = words.pop(0)
    if words:
        raise UserError(f"`repa {cls.verb}` got an unexpected word {words[0]!r}: see `repa {cls.verb} --help`.")


def annotation(cls: type[Command], flag: str, *, with_checks: bool = False) -> Any:
    """The type of the field that a dotted name refers to; `with_checks`: including its checks, as Annotated."""
    current: Any = cls
    parts = _parts(flag)
    for depth, part in enumerate(parts):
        if is_model(current):
            fields = current.model_fields
            if part not in fields:
                meant = _meant(cls, parts, depth, fields)
                raise UserError(
                    f"`repa {cls.verb}` has no option --{flag}.{meant} `repa {cls.verb} --help` prints all."
                )
            current = fields[part].annotation
            if with_checks and fields[part].metadata:  # which pydantic removes from the outermost type
                current = Annotated[current, *fields[part].metadata]
        elif (item := item_model(current)) and part.isdecimal():
            current = item
        else:
            above = ".".join(parts[:depth]).replace("_", "-")
            example = f", only numbered ones such as --{above}.0" if item else ""
            raise UserError(f"`repa {cls.verb}` has no option --{flag}: --{above} has no part {part!r}{example}.")
    return current


def _meant(cls: type[BaseModel], parts: list[str], depth: int, fields: Iterable[str]) -> str:
    """The intended option: one with this ending elsewhere (--learning-rate), by its initials (--lr), or the nearest name."""
    word = parts[-1]
    every = list(names(cls))
    ends = [name.rpartition(".")[2] for name in every]
    initials = ["".join(piece[0] for piece in end.split("_")) for end in ends]
    tails = [end if word.endswith(f"_{end}") else "" for end in ends]  # --encoder-depth
    for sought, spellings in ((word, ends), (word, initials), (max(tails, key=len) or None, tails)):
        if same := [option(name) for name, end in zip(every, spellings, strict=True) if end == sought]:
            return f" Did you mean {' or '.join(map(repr, same))}?"
    return nearest(option(".".join(parts)), [option(".".join([*parts[:depth], name])) for name in fields])


def names(cls: type[BaseModel], above: str = "") -> Iterator[str]:
    """Dotted names of all settings, top-level ones first; number 0 represents the entries of a list."""
    nested: list[tuple[type[BaseModel], str]] = []
    for name, info in cls.model_fields.items():
        if is_model(info.annotation):
            nested.append((info.annotation, f"{above}{name}."))
        elif item := item_model(info.annotation):
            nested.append((item, f"{above}{name}.0."))
        else:
            yield above + name
    for inner, prefix in nested:
        yield from names(inner, prefix)


def _take(flag: str, annotation: Any, given: list[str], verb: str) -> tuple[Any, list[str]]:
    """The value of a flag from the words after it, and the remaining words."""
    if is_model(annotation):
        names = ", ".join(option(f"{flag}.{name}") for name in annotation.model_fields)
        raise UserError(f"--{flag} is a group of options: give {names}.")
    if typing.get_origin(annotation) is tuple:
        types = typing.get_args(annotation)
        if Ellipsis in types:
            return ([], given) if item_model(annotation) else (given, [])
        if len(given) < len(types):
            raise UserError(f"--{flag} needs {len(types)} values, but got {len(given)}: see `repa {verb} --help`.")
        return given[: len(types)], given[len(types) :]
    if typing.get_origin(annotation) is dict:  # words ENCODER=VALUE
        return given, []
    # A switch takes the next word only if it is true or false: --plan SOURCE.
    if annotation is bool and (not given or given[0].lower() not in TRUTHS):
        return True, given
    if not given:
        raise UserError(f"--{flag} needs a value: see `repa {verb} --help`.")
    return given[0], given[1:]


def _store(values: dict[str, Any], flag: str, value: Any, again: bool = False) -> None:
    """Set the value of a dotted name; the number after the last entry of a list appends an entry.

    `again`: the flag was given before. A list of texts is extended (--guidance A --guidance B); otherwise the last value
    counts.
    """
    path = [int(part) if part.isdecimal() else part for part in _parts(flag)]
    owner: Any = values
    for part, after in pairwise(path):
        if isinstance(owner, list):
            assert isinstance(part, int)  # `_read` knows no other entries of a list
            if part > len(owner):
                raise UserError(
                    f"--{flag}: there are {len(owner)} entries, so use number {len(owner)} for the next one."
                )
            owner += [{}] * (part == len(owner))
        else:
            nested = owner.get(part, [] if isinstance(after, int) else {})
            owner[part] = list(nested) if isinstance(after, int) else nested
        owner = owner[part]
    owner[path[-1]] = [*owner[path[-1]], *value] if again and isinstance(value, list) else value


def _parts(flag: str) -> list[str]:
    return flag.replace("-", "_").split(".")


def is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    """Whether a field of this type has settings of its own."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def item_model(annotation: Any) -> Any:
    """The model of the entries of a list, such as alignments; None for other types."""
    arguments = typing.get_args(annotation)
    return arguments[0] if typing.get_origin(annotation) is tuple and arguments and is_model(arguments[0]) else None
