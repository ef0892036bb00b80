"""`repa analyse WHAT ...`: which analysis, and its arguments."""

import importlib

from repa.base.config import Config
from repa.base.errors import UserError, choices
from repa.cli import options, tables

# what -> module of cli, sentence
WHATS = {
    "cknna": ("analyse_runs", "likeness of hidden states to an encoder (CKNNA, CKA) at every depth and noise level"),
    "probe": ("analyse_runs", "linear probe of hidden states at every depth and noise level, and of encoders"),
    "encoders": (
        "analyse_encoders",
        "which encoder to align to: structure, probe, likeness, speed and size in one table",
    ),
    "depth": ("analyse_runs", "how far the prediction moves when a block is left out: where to align"),
    "pictures": ("analyse_pictures", "tokens of a run and of encoders as colours, next to the images"),
    "progress": ("analyse_pictures", "samples of several checkpoints and runs from the same noise"),
    "neighbours": ("analyse_neighbours", "the nearest training images of samples: did the model copy?"),
}


def usage() -> str:
    width = max(map(len, WHATS))
    lines = [f"  {what:<{width}}  {sentence}" for what, (_, sentence) in WHATS.items()]
    return "\n".join(["usage: repa analyse WHAT ...        repa analyse WHAT --help tells more", "", *lines])


def arguments_of(what: str) -> type[Config]:
    """The configuration whose fields are the options of `repa analyse what`."""
    if what not in WHATS:
        raise UserError(f"Unknown analysis {what!r}{choices(what, WHATS)}")
    return getattr(importlib.import_module(f"repa.cli.{WHATS[what][0]}"), f"{what.capitalize()}Arguments")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in options.HELP:
        print(usage())
        return 0
    arguments_of(argv[0])  # refuses what is none
    with tables.outputs(f"repa analyse {argv[0]}"):
        return getattr(importlib.import_module(f"repa.cli.{WHATS[argv[0]][0]}"), argv[0])(argv[1:])
