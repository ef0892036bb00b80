"""Parse the commands in a recipe's promise."""

import shlex

from repa.base.config import Config
from repa.cli import options
from repa.cli.main import command_of
from repa.recipes import RECIPES, load_recipe


def understood(name: str) -> dict[str, Config]:
    """Verb -> its arguments; raises UserError for a command that cannot be parsed."""
    given = {}
    for line in RECIPES[name].promise.splitlines():
        words = shlex.split(line) if line.startswith(("repa ", "torchrun ")) else []
        if words:
            verb, *arguments = words[words.index("repa") + 1 :]
            values = load_recipe(name) if verb == "train" else None
            given[verb] = options.parse(*command_of(verb, arguments), values, on_disk=False)
    return given
