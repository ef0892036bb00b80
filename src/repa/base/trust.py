"""The one gate for dotted names: `mylab.losses.smooth_l1` in a configuration imports and runs code.

Trusted are names that the user typed: in an option, in a recipe file, by `--trust mylab` or `repa.trust("mylab")`. Names in
the files of a run, a data folder or an exported network are not trusted, because such files may come from strangers. A
command refuses all other names; in Python, names in files are refused and names that the caller passes are trusted. Torch-free.
"""

import contextlib
import contextvars
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from repa.base.errors import UserError
from repa.base.files import read_object

DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
SETTING = "net"  # the setting whose value is a dotted name too: "hooked:net=mylab.nets.unet"

# Keys of a config.json that make transformers fetch code from the hub or build a network with another library.
FETCHING = (
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "use_kernels",
    "quantization_config",
)
# Words in keys of a config.json that count modules, and the largest allowed number.
COUNTS = {"layers": 1_000, "_blocks": 1_000, "depth": 1_000, "labels": 100_000}

_trusted: set[str] = set()  # modules, and full names that the user typed
_commands = 0  # running commands: 1 in `repa VERB`, 0 in a program that imports repa
_file: contextvars.ContextVar[str] = contextvars.ContextVar("file whose contents are read", default="")


def trust(*modules: str) -> None:
    """Allow files to name code of these modules and their submodules from now on.

    Raises:
        UserError: not the name of a module.
    """
    for module in modules:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", module):
            raise UserError(f"--trust takes names of modules, such as mylab, but got {module!r}.")
        _trusted.add(module)


def trust_names_in(values: Any) -> None:
    """Trust the dotted names in texts that the user typed, or in a recipe."""
    _trusted.update(_names_in(values))


def flags(values: Any, typed: Iterable[str] = ()) -> list[str]:
    """The options --trust of a command that reads these settings from files, except for names in the words `typed`."""
    modules = sorted({name.partition(".")[0] for name in {*_names_in(values)} - {*_names_in(typed)}})
    return [word for module in modules for word in ("--trust", module)]


def _names_in(values: Any) -> Iterator[str]:
    """Dotted names in texts at any depth: "mylab.f:settings", "mylab.f=path", "hooked:net=mylab.f"."""
    if isinstance(values, str):
        name, *settings = re.split("[:=]", values, maxsplit=1)
        inner = [item.partition("=")[2] for item in "".join(settings).split(",") if item.startswith(f"{SETTING}=")]
        yield from filter(DOTTED.fullmatch, (name, *inner))
    elif isinstance(values, dict):
        yield from _names_in(list(values.values()))
    elif isinstance(values, Iterable):
        for value in values:
            yield from _names_in(value)


@contextlib.contextmanager
def command(typed: list[str]) -> Iterator[None]:
    """While a command runs, trust only the names on its command line. Afterwards the previous trust is restored."""
    global _commands
    before = set(_trusted)
    _commands += 1
    try:
        trust_names_in(_values_of_options(typed))
        yield
    finally:
        _commands -= 1
        _trusted.clear()
        _trusted.update(before)


def _values_of_options(typed: list[str]) -> list[str]:
    """The values of options, and sources. Existing paths are left out, because a stranger may have chosen their names."""
    return [token.partition("=")[2] if token.startswith("--") else token for token in typed if not Path(token).exists()]


@contextlib.contextmanager
def contents_of(file: object) -> Iterator[None]:
    """While the contents of a file are validated: the names in it are not the user's."""
    token = _file.set(str(file))
    try:
        yield
    finally:
        _file.reset(token)


@contextlib.contextmanager
def current_folder() -> Iterator[None]:
    """While trusted code is imported, also search the current folder for modules, after all other places."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def require_trusted(kind: str, name: str) -> None:
    """Raises UserError, with the module and the flag that allows it, unless this dotted name is trusted."""
    file = _file.get()
    if (not _commands and not file) or any(name == known or name.startswith(f"{known}.") for known in _trusted):
        return
    module = name.rpartition(".")[0]
    raise UserError(
        f"{file or 'A file'} names the {kind} {name!r}, code of the module {module!r} that would run here: if you trust it, "
        f"add --trust {module.partition('.')[0]}, else leave the file alone."
    )


def require_origin(kind: str, name: str, component: Any) -> None:
    """Refuse code that a trusted module only imported: `mylab.helpers.rmtree` is code of shutil, which is not trusted.

    A name that the user typed in full is allowed, whatever module its code comes from.
    """
    origin = f"{component.__module__}.{component.__qualname__}"
    if name not in _trusted and origin.partition(".")[0] != name.partition(".")[0]:
        require_trusted(kind, origin)


def require_plain_model(values: Any, file: object, of: str = "") -> None:
    """Refuse the config.json of a model that would fetch code or build an unbounded number of layers.

    Args:
        of: the key of a list, as in "layers_per_block": [2, 2].

    Raises:
        UserError: a refused key or number, at any depth.
    """
    listed = values if isinstance(values, list) else ()
    for key, value in values.items() if isinstance(values, dict) else ((of, value) for value in listed):
        if key in FETCHING and value is not None:
            raise UserError(
                f"{file} sets {key}, by which code from elsewhere would run here: remove that line, or take other weights."
            )
        most = min((most for word, most in COUNTS.items() if word in str(key)), default=None)
        if most and isinstance(value, int) and value > most:
            raise UserError(f"{file} has {key} {value:,}: more than {most:,} are refused.")
        require_plain_model(value, file, str(key))


def require_own_weights(folder: Path) -> None:
    """Raises UserError for an index of weights (*.index.json) that names files in other folders."""
    for path in sorted(folder.glob("*.index.json")):
        parts = read_object(path, weight_map=dict)["weight_map"].values()
        if strays := [name for name in parts if not (isinstance(name, str) and name and Path(name).name == name)]:
            raise UserError(f"{path} is refused: it names {str(strays[0])!r:.80}, which does not lie in its folder.")
