"""`repa show NAME`: a recipe, prepared data, or a run, in words."""

from pathlib import Path

from repa.base import files
from repa.base.config import Config
from repa.base.errors import UserError, nearest
from repa.cli import options
from repa.cli.console import say
from repa.recipes import RECIPES, load_recipe
from repa.runs import layout

ABOUT = "Print a recipe, a folder of prepared data, or a run folder."


class ShowArguments(Config):
    name: str
    """recipe name, data folder or run folder"""


def main(argv: list[str]) -> int:
    given = options.parse(ShowArguments, argv, verb="show", about=ABOUT, positional=("name",))
    path = Path(given.name)
    if given.name in RECIPES:
        say(as_comment(RECIPES[given.name].promise))
        say(load_recipe(given.name).to_yaml())
    elif (path / layout.CONFIG).is_file():
        _show_run(path)
    elif (path / "manifest.json").is_file():
        from repa.data.manifest import Manifest

        say(Manifest.open(path).describe())
    else:
        raise UserError(
            f"{given.name!r} is no recipe, run folder or data folder: `repa list recipes` prints the recipes."
            f"{nearest(given.name, RECIPES)}"
        )
    return 0


def as_comment(text: str) -> str:
    """So that the whole output is a .yaml file that `repa train` takes."""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _show_run(run: Path) -> None:
    from repa.runs.log import read_metrics

    rows = list(read_metrics(run))
    steps = layout.checkpoint_steps(run)
    say(
        f"run {run}: {rows[-1]['step'] if rows else 0:,} steps logged, checkpoints {', '.join(map(str, steps)) or 'none'}"
    )
    size = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    say(f"size on disk {files.size(size)}")
    say((run / layout.CONFIG).read_text(encoding="utf-8"))
