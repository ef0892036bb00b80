"""`repa list KIND`: every name that a configuration accepts."""

from collections.abc import Callable

from repa.base.config import Config
from repa.base.errors import UserError, nearest
from repa.cli import options
from repa.cli.console import say

ABOUT = (
    "List names: recipes, models, encoders, text-encoders, autoencoders, paths, times, samplers, guidances, losses, projectors, "
    "schedules."
)

Groups = dict[str, dict[str, str]]  # heading -> name -> sentence; an empty heading is not printed


class ListArguments(Config):
    kind: str = ""
    """what to list; empty lists the kinds"""


def main(argv: list[str]) -> int:
    given = options.parse(ListArguments, argv, verb="list", about=ABOUT, positional=("kind",))
    kinds = _kinds()
    if not given.kind:
        say("\n".join(kinds))
    elif given.kind in kinds:
        groups = kinds[given.kind]()
        width = max(len(name) for names in groups.values() for name in names)
        for number, (group, names) in enumerate(groups.items()):
            if group:
                say(("\n" if number else "") + f"# {group}")
            for name, sentence in names.items():
                say(f"{name:<{width}}  {sentence}".rstrip())
    else:
        raise UserError(
            f"There is nothing called {given.kind!r} to list: allowed are {', '.join(kinds)}.{nearest(given.kind, kinds)}"
        )
    return 0


def _kinds() -> dict[str, Callable[[], Groups]]:
    from repa.alignment import LOSSES, PROJECTORS, SCHEDULES
    from repa.autoencoders import AUTOENCODERS
    from repa.conditions import TEXT_ENCODERS
    from repa.diffusion import GUIDANCES, PATHS, SAMPLERS, TIMESTEPS
    from repa.encoders import ENCODERS
    from repa.models.config import model_names

    registries = {
        "encoders": ENCODERS, "text-encoders": TEXT_ENCODERS, "autoencoders": AUTOENCODERS, "paths": PATHS,
        "times": TIMESTEPS, "samplers": SAMPLERS, "guidances": GUIDANCES, "losses": LOSSES, "projectors": PROJECTORS,
        "schedules": SCHEDULES,
    }  # fmt: skip
    kinds = {
        kind: (lambda registry=registry: {"": dict.fromkeys(registry.names(), "")})
        for kind, registry in registries.items()
    }
    kinds["models"] = lambda: {"": dict.fromkeys(model_names(), "")}
    kinds["recipes"] = _recipes
    return dict(sorted(kinds.items()))


def _recipes() -> Groups:
    from repa.recipes import RECIPES

    groups: Groups = {}
    for name, recipe in RECIPES.items():
        groups.setdefault(recipe.group, {})[name] = recipe.about
    return groups
