"""`repa prepare SOURCE DATA ...`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from repa.base import files, launch
from repa.base.errors import UserError
from repa.base.reporting import duration
from repa.cli import options
from repa.cli.console import ProgressBar, say, short
from repa.data.config import FP16, PrepareConfig
from repa.data.manifest import MANIFEST, PARTS, Manifest
from repa.data.progress import started
from repa.data.sources.folders import METADATA
from repa.encoders import ENCODERS
from repa.encoders.loading import by_encoder
from repa.recipes import RECIPES
from repa.recipes.small import GROUP
from repa.runs import layout

if TYPE_CHECKING:
    from repa.data import Source
    from repa.data.pipeline import Execution

FEATURES, TEXT = "features:", "text"
LONGEST_NAME = 60  # letters of a name that are shown
FIRST_GROUPS = ("Small runs", GROUP)  # groups of recipes for a first run
NAMED = 5  # empty classes or unreadable images that are named
CLASSES_SHOWN = 10  # classes listed with their counts; the manifest has all


class PrepareArguments(PrepareConfig, options.Command):
    """Turn images (a folder or zip of class folders, tar shards, parquet, arrays, ..., or the packaged `photographs`)
    into shards for training: cropped images, latents, labels and target tokens. If interrupted, run the same command
    again: it continues. Settings that you omit are those of the folder. `repa prepare DATA --only ...` and
    `repa prepare DATA --remove ...` change prepared data without their source. `torchrun --nproc-per-node 8 -m repa
    prepare ...` shares the work.
    """

    verb = "prepare"
    positional = ("source", "out")

    resolution: int = 0
    """Side of the square images in pixels (ADM's centre crop); required for a new folder."""
    source: str
    """folder, zip, tar shards, parquet, array, hf:OWNER/NAME, or photographs:num=10000"""
    out: str = ""
    """folder of the prepared data; omit it to change prepared data, which are then the only folder given"""
    only: tuple[str, ...] = ()
    """Make only these parts: base (labels, images, latents), features:ENCODER, text. Without a source: not base."""
    remove: tuple[str, ...] = ()
    """Delete these parts of the prepared data: features:ENCODER, text, images."""
    plan: bool = False
    """Print counts, sizes and the predicted time, after a measurement of at most a minute; write nothing."""

    @model_validator(mode="before")
    @classmethod
    def _rest_from_folder(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Omitted settings are those of the folder; encoders, their weights and forms are added to the folder's."""
        folder = Path(values.get("out") or values.get("source", "."))
        # So the command that continues, or adds to, a folder need not repeat its settings.
        before = started(folder) if (folder / MANIFEST).is_file() or (folder / PARTS).is_dir() else None
        old = before.config if before else None
        stored, known = (old.model_dump(), old.features) if old else ({}, ())
        made = [part.removeprefix(FEATURES) for part in values.get("only", ()) if part.startswith(FEATURES)]
        named = [ENCODERS.check(name) for name in (*values.get("features", ()), *made)]
        new = [name for name in dict.fromkeys(named) if name not in known]
        forms, weights = (by_encoder(values.get(name, {})) for name in ("feature_forms", "feature_weights"))
        if old and "" in forms:
            # A form without ENCODER= applies to the encoders that this command adds or names; in a new folder, to all.
            shared = dict.fromkeys(new or named or known, forms.pop(""))
            forms = {**shared, **forms}
        return {
            **stored,
            **values,
            "features": [*known, *new],
            "feature_forms": {**stored.get("feature_forms", {}), **forms},
            "feature_weights": {**stored.get("feature_weights", {}), **weights},
        }

    def idle(self) -> dict[str, str]:
        removing = {"source", "out", "remove"}
        if self.remove:
            return dict.fromkeys(type(self).model_fields.keys() - removing, "with --remove")
        unread = {} if self.text else dict.fromkeys(("text_weights", "text_form"), "without --text")
        unread |= (
            {} if self.features else dict.fromkeys(("grid", "feature_forms", "feature_weights"), "without --features")
        )
        if self.autoencoder == "pixels" and not (self.features or self.text):
            unread |= {"precision": "without --autoencoder, --features or --text"}
        if not self.out:
            read = {*removing, "only", "text", "text_weights", "text_form", "feature_weights", "feature_forms"}
            unread |= dict.fromkeys(
                type(self).model_fields.keys() - read,
                "without a source, because additions use the stored images and captions",
            )
        return unread


def main(argv: list[str]) -> int:
    given = options.parse(PrepareArguments, argv)
    if layout.is_trained(Path(given.source)):
        raise UserError(f"{given.source} is a run of `repa train`, not a source of images: give the images themselves.")
    if given.remove:
        _remove(Path(given.out or given.source), given.remove)
    elif not given.out:
        _add(Path(given.source), given)
    elif not given.resolution:
        raise UserError("`repa prepare` needs --resolution for a new folder: the side of the images, e.g. 256.")
    elif given.plan:
        _plan(given)
    else:
        is_whole = start(given.source, Path(given.out), options.part(PrepareConfig, given), given.only)
        if is_whole:
            fitting = _recipes_for(given)
            some = f"for {given.resolution} pixels {', '.join(fitting)}; " if fitting else ""
            say(f"Next: repa train RECIPE --data {given.out} --out RUN   ({some}repa list recipes names all)")
    return 0


def _recipes_for(given: PrepareArguments) -> list[str]:
    """Recipes for a first run: a network on pixels of this size. Too many recipes for latents fit to list them."""
    backbone = "mmdit" if given.text else "dit"
    fitting = {n: each for n, each in RECIPES.items() if each.pixels == given.resolution and each.group in FIRST_GROUPS}
    return [n for n, each in fitting.items() if given.autoencoder == "pixels" and each().model.backbone == backbone]


def start(source: "str | Source", out: Path, config: PrepareConfig, only: Sequence[str] = ()) -> bool:
    """Do this process's share of the preparation; returns whether the data are complete."""
    from repa.data.sources.opening import open_source

    with _bar(out) as bar:
        # before the import of torch, which takes seconds: a mistyped name is reported at once
        images = open_source(source, labels=config.labels)
        from repa.data import prepare

        manifest = prepare(images, out, config, only=only, **_execution(bar))
    _report(out, manifest)
    return manifest is not None


def _add(folder: Path, given: PrepareArguments) -> None:
    if not given.only:
        raise UserError(f"`repa prepare` needs a source and a folder, but got only {given.source!r}: give both.")
    wrong = [part for part in given.only if part != TEXT and not part.startswith(FEATURES)]
    if wrong:
        raise UserError(
            f"--only {wrong[0]} needs the source: only features:ENCODER and text can be made from stored images and captions."
        )
    from repa.data import add

    for part in given.only:
        weights, form, spec = given.text_weights, str(given.text_form), given.text
        if part != TEXT:
            spec = ENCODERS.check(part.removeprefix(FEATURES))
            weights, form = given.feature_weights.get(spec, ""), given.feature_forms.get(spec, FP16)
        one = f"{TEXT}:{spec}" if part == TEXT else f"{FEATURES}{spec}"
        with _bar(folder) as bar:
            manifest = add(folder, one, weights=weights or None, form=form, **_execution(bar))
        _report(folder, manifest)


def _bar(folder: Path) -> ProgressBar:
    rank, world = launch.place()[:2]
    return ProgressBar(f"preparing {folder.name}" + (f" (share {rank + 1} of {world})" if world > 1 else ""), "images")


def _execution(bar: ProgressBar) -> "Execution":
    from repa.base import dist

    rank, world = launch.place()[:2]  # the processes do not communicate, so they join no group
    return {"rank": rank, "world": world, "progress": bar, "device": dist.own_device()}


def _report(folder: Path, manifest: Manifest | None) -> None:
    """Print the inventory, or what to do if other processes are not done yet."""
    if manifest is None:
        say(
            f"{folder}: this share is done, others are not. The last process to finish completes the folder. If no process "
            "is running, run the same command again."
        )
        return
    num = len(manifest.class_names)
    classes = f"{num:,} classes" if num > 1 else "1 class"
    flipped = f", {manifest.num_images - len(manifest.originals):,} mirrored copies" if manifest.config.flip else ""
    say(f"{folder}: {len(manifest.originals):,} images of {classes} at {manifest.resolution} pixels{flipped}.")
    say(*(f"  {line}" for line in inventory(manifest)))


def _remove(folder: Path, names: Sequence[str]) -> None:
    from repa.data import remove

    for name in names:
        manifest = remove(folder, name)
        say(f"{folder}: {name} removed." + (f" Left: {', '.join(manifest.fields)}." if manifest else ""))


def _plan(given: PrepareArguments) -> None:
    from repa.base import dist
    from repa.data import make_plan

    world = launch.place().world
    plan = make_plan(
        given.source, given.out, options.part(PrepareConfig, given), only=given.only, device=dist.own_device()
    )
    copies = ", each also mirrored" if plan.num_copies == 2 else ""
    say(f"source    {plan.source}: {plan.num_images:,} images of {plan.num_classes} classes{copies}")
    say(f"shards    {plan.num_shards:,}; {plan.num_todo:,} images remain")
    for field, size in plan.sizes.items():
        say(f"          {field:<24} {files.size(size):>12}")
    say(f"          {'total':<24} {files.size(plan.num_bytes):>12}")
    if given.text:
        say(f"          and the tokens of {given.text} for each caption; the number of captions is not known yet")
    for step, rate in plan.rates.items():
        if step == "base" and given.autoencoder == "pixels":  # a copy in memory: its rate is meaningless
            continue
        what = f"encode, {given.autoencoder}" if step == "base" else f"encode, {step}" if step != "decode" else step
        say(f"measured  {what:<24} {rate:>12,.1f} images/s")
    processes = f" with {world} processes like this one" if world > 1 else ""
    say(f"time      {duration(plan.seconds(world))}{processes} for the missing parts. Nothing was written.")


def inventory(manifest: Manifest) -> list[str]:
    """The inventory as lines: origin of the labels, classes with their counts, and what was left out, by kind."""
    counts = [
        (short(name, LONGEST_NAME), count)
        for name, count in zip(manifest.class_names, manifest.class_counts, strict=True)
    ]
    filled = [(name, count) for name, count in counts if count]
    lines, num_classes = [], len(manifest.class_names)
    if manifest.inventory.labels_from:
        lines.append(f"labels      from {manifest.inventory.labels_from}")
    shown = ", ".join(f"{name} {count:,}" for name, count in filled[:CLASSES_SHOWN])
    more = f" and {len(filled) - CLASSES_SHOWN:,} more" if len(filled) > CLASSES_SHOWN else ""
    numbers = [count for _, count in filled]
    least, most = min(numbers), max(numbers)
    each = f"{least:,} to {most:,}" if least < most else f"{most:,}"
    lines.append(f"classes     {shown}{more}; {each} images each")
    if empty := [name for name, count in counts if not count]:
        lines.append(f"no images   {len(empty):,} classes ({_some(empty)}): sampling does not use them")
    if (num := manifest.inventory.captioned) is not None:
        others = "; the others have no readable captions" if num < len(manifest.originals) else ""
        lines.append(f"captions    of {num:,} of {len(manifest.originals):,} images{others}")
    left_out = [
        what if what.startswith(("folder", "column", "array")) else f"{count:,} {what}"
        for what, count in manifest.inventory.left_out.items()
    ]
    if manifest.skipped:
        images = "images" if len(manifest.skipped) > 1 else "image"
        left_out.append(f"{len(manifest.skipped):,} unreadable {images} ({_some(manifest.skipped)})")
    if left_out:
        lines.append(f"left out    {'; '.join(left_out)}")
    unread = {what.rpartition(" of ")[2] for what in manifest.inventory.left_out if what.startswith("column")}
    if num_classes == 1 and not manifest.config.labels and (tables := sorted(unread & {*METADATA})):
        lines.append(f"            to use a column as labels, prepare a new folder with --labels {tables[0]}:COLUMN")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more in the manifest" if len(names) > NAMED else ""
    return ", ".join(short(name, LONGEST_NAME) for name in names[:NAMED]) + more
