"""`repa show NAME`: describe a component, a recipe, a run or prepared data."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from repa.base import files
from repa.base.errors import UserError, nearest
from repa.base.imports import installed
from repa.base.registry import Registry, parse_spec
from repa.cli import options
from repa.cli.console import say, table
from repa.cli.list import REGISTRIES
from repa.data.manifest import MANIFEST, Manifest
from repa.encoders import canonical
from repa.encoders.families import PACKAGED, facts_of, family_of
from repa.models.config import dimensions, model_names
from repa.recipes import RECIPES, load_recipe
from repa.runs import layout
from repa.training.config import TrainConfig

# Settings that everybody looks for in a recipe: shown even if they are the default.
ALWAYS = {
    "": {"alignments", "batch_size", "num_steps", "ema_decay"}, "model": {"name"}, "diffusion": {"prediction"},
    "alignments": {"loss", "weight", "projector"}, "optimizer": {"name", "learning_rate"},
}  # fmt: skip
Rows = list[tuple[str, str]]  # a line of YAML, its meaning


class ShowArguments(options.Command):
    """Describe a recipe, any other name of `repa list` (an encoder, a model, a loss, ...), prepared data, or a run."""

    verb = "show"
    positional = ("name",)

    name: str
    """a name of `repa list`, a data folder or a run folder"""
    all: bool = False
    """Print every setting of a recipe or a run with its meaning, not only those that differ from the defaults."""


def main(argv: list[str]) -> int:
    given = options.parse(ShowArguments, argv)
    path = Path(given.name)
    if given.name in RECIPES:
        # The promise is a comment, so that the whole output is a .yaml file that `repa train` accepts.
        say(*(f"# {line}".rstrip() for line in RECIPES[given.name].promise.splitlines()), "")
        say(*_configuration(load_recipe(given.name).model_dump(mode="json"), given))
    elif (path / layout.CONFIG).is_file():
        _show_run(path, given)
    elif (path / MANIFEST).is_file():
        say(*Manifest.open(path).describe())
    elif shown := _named(given.name):
        say(*"\n\n".join(shown).split("\n"))
    else:
        meant = nearest(given.name, shown_names(), files.CLOSE) or files.near(path)
        raise UserError(
            f"{given.name!r} is neither a run folder nor a data folder nor a known name.{meant} "
            "`repa list recipes` prints the recipes, `repa list` the other kinds of names."
        )
    return 0


def shown_names() -> list[str]:
    """All names that can be shown, each once: a loss and a schedule may share one."""
    return list(dict.fromkeys([*RECIPES, *model_names(), *(name for each in REGISTRIES.values() for name in each)]))


def _named(spec: str) -> list[str]:
    """All components of this name: a loss and a schedule may share one."""
    name, _ = parse_spec(spec)
    shown = [_model(name)] if name in model_names() else []
    for registry in REGISTRIES.values():
        if registry.listing == "encoders" and canonical(name) in registry:
            shown.append(_encoder(canonical(name)))
        elif name in registry:
            shown.append(_entry(registry, name))
    return shown


def _entry(registry: Registry, name: str) -> str:
    """Describe an entry of a registry: its docstring, and the settings of its spec."""
    settings = registry.settings(name)
    lines = [f"{registry.kind} {name}", *registry.docstring(name).splitlines()]
    if name in registry.facts:
        lines[1:] = [registry.facts[name]]
    values = ",".join(f"{key}={default}" for key, default in settings.items())
    some = " (the defaults)" if any(default != "..." for default in settings.values()) else ""
    written = f"{name}:{values}{some}" if settings else f"{name}, which has no settings"
    lines += [f"written as {written}", f"in {registry.table[name].partition(':')[0]}"]
    return "\n".join([lines[0], *(f"  {line}".rstrip() for line in lines[1:])])


def _model(name: str) -> str:
    size = dimensions(name)
    # A JiT needs another backbone than that of the SiT recipes.
    recipe = "jit-b16" if name.startswith("JiT") else "sit-b2"
    facts = [
        ("size", f"{size.depth} blocks of width {size.hidden_dim}, {size.num_heads} heads, patches of {size.patch_size}"),
        ("cost", f"repa estimate {recipe} --model.name {name}"),
        ("train", f"repa train {recipe} --model.name {name} --data DATA --out RUN"),
    ]  # fmt: skip
    return "\n".join([f"model {name}", *table({"": facts})])


def _encoder(name: str) -> str:
    facts = facts_of(name)
    rows = [
        ("what", facts.about),
        ("weights", f"{facts.weights}; {_whether_here(name)}"),
        ("licence", facts.licence + (": see the source of the weights" if facts.extra else ", as for the package")),
        ("input", f"images of any size; a 256-pixel image is resized to {facts.pixels} x {facts.pixels}, {facts.colours}"),
        ("tokens", f"{facts.grid} x {facts.grid} of width {facts.dim} for images of 256 pixels"),
    ]  # fmt: skip
    if facts.extra:
        there = "installed here" if installed(facts.extra) else "not installed here"
        rows.append(("needs", f'pip install "repa[{facts.extra}]": {there}'))
    if facts.measures:
        rows.append(("evaluate with it", f"repa evaluate SAMPLES --reference DATA --features {name}"))
    else:
        rows.append(("align to it", f"repa train RECIPE --alignments.0.target {name} ..."))
        rows.append(("store tokens", f"repa prepare SOURCE DATA --resolution 256 --features {name}"))
    rows.append(("more", "docs/encoders.md"))
    return "\n".join([f"encoder {name}", *table({"": rows})])


def _whether_here(name: str) -> str:
    if name in PACKAGED:
        return "no download"
    # This needs torch, which the other names do not.
    from repa.encoders.checkpoints import on_this_machine

    found = on_this_machine(name, *family_of(name))
    return f"on this machine in {found}" if found else "not on this machine"


def _configuration(values: Mapping[str, Any], given: ShowArguments) -> list[str]:
    """The settings of a recipe or a run as YAML."""
    if given.all:
        return table({"": _settings(TrainConfig, values, every=True)})
    lines = [line for line, _ in _settings(TrainConfig, values)]
    command = shlex.join(["repa", "show", given.name, "--all"])
    return [*lines, "", f"# The other settings have their defaults: {command} prints all, with their meanings."]


def _settings(cls: type[BaseModel], values: Mapping[str, Any], above: str = "", *, every: bool = False) -> Rows:
    """`values` of the model `cls` as a file may hold them; without `every`, only those that differ from the defaults."""
    rows: Rows = []
    defaults = cls.model_construct().model_dump(mode="json")
    for name, value in values.items():
        info = cls.model_fields.get(name)
        about = f"# {info.description}" if info else ""
        inner = info and (info.annotation if options.is_model(info.annotation) else options.item_model(info.annotation))
        if inner and isinstance(value, Mapping):
            found = _settings(inner, value, name, every=every)
            rows += [(f"{name}:", about), *((f"  {line}", what) for line, what in found)] if found else []
        elif inner and isinstance(value, list) and value:
            rows.append((f"{name}:", about))
            for each in value:
                found = _settings(inner, each, name, every=every)
                rows += [(f"{'  ' if i else '- '}{line}", what) for i, (line, what) in enumerate(found)]
        elif every or name in ALWAYS.get(above, ()) or name not in defaults or value != defaults[name]:
            shown = yaml.safe_dump(value, default_flow_style=True, width=1_000, allow_unicode=True)
            rows.append((f"{name}: {shown.splitlines()[0]}", about))  # a plain value is followed by YAML's end mark
    return rows


def _show_run(run: Path, given: ShowArguments) -> None:
    from repa.runs.checkpoint import recorded_settings
    from repa.runs.log import lost_rows, read_metrics

    config, steps = layout.read_config(run), layout.checkpoint_steps(run)
    if steps:
        layout.require_settings(run, steps[-1], recorded_settings(run, steps[-1]), config)
    rows = list(read_metrics(run))
    say(
        f"run {run}: {rows[-1]['step'] if rows else 0:,} steps logged, checkpoints {', '.join(map(str, steps)) or 'none'}"
    )
    if lost := lost_rows(run, rows, steps):
        say(f"note: {lost}")
    size = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    say(f"size on disk {files.size(size)}")
    # Unchanged from the file: looking at a run needs no trust in the names in it.
    say("", *_configuration(config, given))
