"""`repa completion SHELL`: the script for tab completion of verbs, options and names.

The script calls `repa completion --words ...` at each completion, so it offers exactly what the verbs accept.
"""

import functools
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from pydantic import AfterValidator

from repa.base.config import option
from repa.base.errors import UserError
from repa.cli import options
from repa.cli.console import say

WORDS = "--words"
# where nothing is offered, each shell completes names of files
SCRIPTS = {
    "bash": """\
_repa() {
    local IFS=$'\\n'
    COMPREPLY=($(repa completion --words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _repa repa""",
    "zsh": """\
_repa() {
    local -a found
    found=(${(f)"$(repa completion --words "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -- $found; else _files; fi
}
compdef _repa repa""",
    "fish": """\
function __repa_words
    set -l before (commandline -opc)
    repa completion --words $before[2..] (commandline -ct) 2>/dev/null
end
complete -c repa -a '(__repa_words)'""",
}


class CompletionArguments(options.Command):
    """Print the script for tab completion of `repa`. bash, in ~/.bashrc: eval "$(repa completion bash)".
    zsh, in ~/.zshrc after compinit: eval "$(repa completion zsh)". fish, in ~/.config/fish/config.fish: repa
    completion fish | source.
    """

    verb = "completion"
    positional = ("shell",)

    shell: Literal["bash", "zsh", "fish"]
    """bash, zsh or fish"""


def main(argv: list[str]) -> int:
    if argv[:1] == [WORDS]:
        say(*candidates(argv[1:] or [""]))
        return 0
    given = options.parse(CompletionArguments, argv)
    say(*SCRIPTS[given.shell].split("\n"))
    return 0


def candidates(words: list[str]) -> list[str]:
    """Completions of the last of the words after `repa`."""
    *before, word = [each for each in words if each != "="]  # bash cuts --flag=value into three
    try:
        return sorted(name for name in set(_allowed(before, word)) if name.startswith(word))
    except UserError:  # in the words before
        return []


def _allowed(before: list[str], word: str) -> Iterable[str]:
    from repa.cli.analyse import WHATS
    from repa.cli.main import VERBS, command_of

    if not before:
        return VERBS
    verb, *rest = before
    if verb not in VERBS:
        return ()
    if verb == "analyse" and not rest:
        return WHATS
    return _of_command(*command_of(verb, rest), word)


def _of_command(cls: type[options.Command], rest: list[str], word: str) -> Iterable[str]:
    """Options, values of an option, or values of a positional argument."""
    if word.startswith("-"):
        return [option(name) for name in (*options.names(cls), "help")]
    flags = [index for index, each in enumerate(rest) if each.startswith("--")]
    if flags:
        return _values(options.annotation(cls, rest[flags[-1]][2:], with_checks=True))
    name = next(iter(cls.positional[len(rest) :]), "")
    if name not in cls.model_fields:  # all are given, or it is a list of files
        return ()
    return _of_word(name) or _values(options.annotation(cls, name, with_checks=True))


def _of_word(name: str) -> Iterable[str]:
    """The names for a positional field, if a table lists them."""
    from repa.cli import list as listing
    from repa.cli import show
    from repa.recipes import RECIPES

    named: dict[str, Callable[[], Iterable[str]]] = {
        "recipe": lambda: RECIPES, "kind": listing.kinds, "name": show.shown_names
    }  # fmt: skip
    return named[name]() if name in named else ()


def _values(annotation: Any) -> Iterator[str]:
    """The texts that a type allows, if they can be listed."""
    if typing.get_origin(annotation) is Literal:
        yield from map(str, typing.get_args(annotation))
    elif isinstance(annotation, type):
        return
    else:
        for part in (*getattr(annotation, "__metadata__", ()), *typing.get_args(annotation)):
            check = part.func if isinstance(part, AfterValidator) else None
            yield from check.args[0] if isinstance(check, functools.partial) else _values(part)
