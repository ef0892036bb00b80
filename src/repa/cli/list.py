"""`repa list KIND`: every name that a configuration accepts."""

from repa.base.config import Config
from repa.base.errors import UserError, nearest
from repa.cli import options
from repa.cli.console import say

ABOUT = "List names: recipes, models, encoders, autoencoders, paths, times, samplers, losses, projectors, schedules."


class ListArguments(Config):
    kind: str = ""
    """what to list; empty lists the kinds"""


def main(argv: list[str]) -> int:
    given = options.parse(ListArguments, argv, verb="list", about=ABOUT, positional=("kind",))
    kinds = _kinds()
    if not given.kind:
        say("\n".join(kinds))
    elif given.kind in kinds:
        lines = kinds[given.kind]()
        width = max(map(len, lines))
        for name, sentence in lines.items():
            say(f"{name:<{width}}  {sentence}".rstrip())
    else:
        raise UserError(
            f"There is nothing called {given.kind!r} to list: allowed are {', '.join(kinds)}.{nearest(given.kind, kinds)}"
        )
    return 0


def _kinds():
    from repa.alignment import LOSSES, PROJECTORS, SCHEDULES
    from repa.autoencoders import AUTOENCODERS
    from repa.diffusion import PATHS, SAMPLERS, TIMESTEPS
    from repa.encoders import ENCODERS
    from repa.models.config import model_names
    from repa.recipes import RECIPES

    registries = {
        "encoders": ENCODERS, "autoencoders": AUTOENCODERS, "paths": PATHS, "times": TIMESTEPS, "samplers": SAMPLERS,
        "losses": LOSSES, "projectors": PROJECTORS, "schedules": SCHEDULES,
    }  # fmt: skip
    kinds = {
        kind: (lambda registry=registry: dict.fromkeys(registry.names(), "")) for kind, registry in registries.items()
    }
    kinds["recipes"] = lambda: {name: recipe.about for name, recipe in RECIPES.items()}
    kinds["models"] = lambda: dict.fromkeys(model_names(), "")
    return dict(sorted(kinds.items()))
