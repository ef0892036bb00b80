"""Named training configurations: the results of the paper's tables, related methods, and small runs for a CPU.

`repa list recipes` lists them, `repa show NAME` prints one, and the command line can override any field.
"""

from pathlib import Path

from repa.base.config import read_yaml
from repa.base.errors import UserError, choices
from repa.base.trust import trust_names_in
from repa.recipes.methods import method_recipes
from repa.recipes.networks import network_recipes
from repa.recipes.paper import paper_recipes
from repa.recipes.recipe import Recipe
from repa.recipes.small import cifar10, cifar10_repa, own_image_recipes, quickstart, quickstart_repa, quickstart_text
from repa.runs import layout
from repa.training.config import TrainConfig

RECIPES: dict[str, Recipe] = {
    **paper_recipes(),
    **method_recipes(),
    **own_image_recipes(),
    **network_recipes(),
    "quickstart": Recipe.of(quickstart, pixels=32),
    "quickstart-repa": Recipe.of(quickstart_repa, pixels=32),
    "quickstart-text": Recipe.of(quickstart_text, pixels=32),
    "cifar10": Recipe.of(cifar10, pixels=32),
    "cifar10-repa": Recipe.of(cifar10_repa, pixels=32),
}


def load_recipe(name: str) -> TrainConfig:
    """A recipe by name, or a YAML file such as the config.yaml of a run folder."""
    if name in RECIPES:
        return RECIPES[name]()
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        # A recipe file is the user's; the configuration of a run folder may be another person's and is untrusted.
        values = read_yaml(path)
        if not (path.name == layout.CONFIG and layout.is_trained(path.parent)):
            trust_names_in(values)
        return TrainConfig.parse(values, where=str(path))
    if path.is_dir():
        return TrainConfig.load(layout.require_run(path))
    raise UserError(
        f"Unknown recipe {name!r}{choices(name, RECIPES, 'repa list recipes')} Or give a .yaml file or a run folder."
    )
