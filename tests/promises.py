"""The commands that a recipe promises, as their parsers understand them."""

import shlex

from repa.base.config import Config
from repa.cli import evaluate, options, prepare, sample, train
from repa.recipes import RECIPES, load_recipe

ROOMS = {
    "prepare": (prepare.PrepareArguments, ("source", "out")),
    "train": (train.TrainArguments, ("recipe",)),
    "sample": (sample.SampleArguments, ("run",)),
    "evaluate": (evaluate.EvaluateArguments, ("samples",)),
}


def understood(name: str) -> dict[str, Config]:
    """Verb -> its arguments; a command that a parser does not take raises UserError."""
    given = {}
    for line in RECIPES[name].promise.splitlines():
        words = shlex.split(line) if line.startswith(("repa ", "torchrun ")) else []
        if words:
            verb, *arguments = words[words.index("repa") + 1 :]
            kind, positional = ROOMS[verb]
            values = load_recipe(name) if verb == "train" else None
            given[verb] = options.parse(kind, arguments, verb=verb, about="", positional=positional, values=values)
    return given
