"""`repa quickstart`: train the same SiT on real images without and with alignment, and compare the two on one page."""

import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from repa.base import imports
from repa.base.config import option
from repa.base.reporting import duration
from repa.cli import options, prepare, train
from repa.cli.console import LINE_EVERY, ProgressBar, say
from repa.cli.together import run_together
from repa.data.config import PrepareConfig
from repa.recipes import load_recipe
from repa.recipes.small import RESOLUTION, Choice, choose, extractor_for, patches_of
from repa.runs import layout
from repa.training.config import TrainConfig

if TYPE_CHECKING:
    from repa.data import Source

RUNS = {"baseline": "quickstart", "aligned": "quickstart-repa"}  # name of the run -> recipe
PAGE = "report.html"
PHOTOGRAPHS = "photographs"
TEXT = "tiny-text:tokens=12"  # of quickstart-text
GRID = 8  # side of the token grid at both resolutions, for the target's features
# crops of the photographs: an eighth of what a run sees; the distances need the features of all of them
NUM_CROPS = 4_000
SMALLEST = 0.8  # smallest crop relative to the photograph; with smaller crops a short training learns only texture


class QuickstartArguments(options.Command):
    """Run the whole comparison offline on this machine: prepare random crops of photographs, train the same SiT without
    and with alignment from the same seed, and compare samples and Fréchet distances in report.html. Takes minutes on
    two CPU cores. If interrupted, run it again: it continues. --source does the same with your own images.
    """

    verb = "quickstart"
    positional = ("source",)

    out: str = ""
    """Folder for data, runs and report; empty: quickstart, or quickstart-NAME for your own images."""
    source: str = PHOTOGRAPHS
    """Images: the photographs inside the package, or a folder or zip of 20 to 100,000 of your own, with one folder per class."""
    labels: str = ""
    """Origin of the classes of your own images, as in `repa prepare --labels`; empty: the source's own."""
    resolution: Literal[0, 32, 64] = 0
    """Resolution in pixels; 0: 32, at which a few minutes of training show the most."""
    num_steps: int = Field(0, ge=0)
    """Training steps of each run; 0: chosen from the data."""
    seed: int = 0
    """Seed of data, training and samples."""


def main(argv: list[str]) -> int:
    given = options.parse(QuickstartArguments, argv)
    is_own, begin = given.source != PHOTOGRAPHS, time.perf_counter()
    from repa.data import open_source

    images = given.source if is_own else crops()
    source = open_source(images, labels=given.labels)
    for package in ("jinja2", "matplotlib"):  # of the report, which comes last
        imports.need(package, "The quickstart", extra="quickstart")
    folder = Path(given.out or (f"quickstart-{Path(given.source).resolve().stem}" if is_own else "quickstart"))
    data = folder / "data"
    recipes = {name: load_recipe(recipe) for name, recipe in RUNS.items()}
    target = recipes["aligned"].alignments[0].target
    choice = _choice(given, recipes["baseline"], source) if is_own else _for_photographs(given)
    every = recipes["baseline"].preview.every
    if 0 < given.num_steps <= every:
        say(
            f"  note: {given.num_steps:,} steps have one evaluation, at the end, so the report will show no curve and no "
            f"speed-up. There is one every {every:,} steps."
        )
    choice = replace(choice, changes={**choice.changes, "seed": given.seed})
    config = PrepareConfig(
        resolution=choice.resolution,
        features=(target,),
        grid=GRID,
        labels=given.labels,
        flip=choice.flip,
        skip_bad=is_own,
    )
    prepare.start(source, data, config)
    flags = _flags(choice.changes)
    trainings = [["train", RUNS[n], "--data", str(data), "--out", str(folder / n), *flags] for n in RUNS]
    num_steps = choice.changes.get("num_steps", recipes["baseline"].num_steps)
    if code := _train(trainings, data, choice.changes["preview.features"], num_steps):
        return code
    if not _has_page(folder):
        say("Writing the report.")
        commands = [
            shlex.join([*_program(), "quickstart", *_flags(given.model_dump(exclude_defaults=True))]),
            "# equivalent commands:",
            shlex.join(["repa", "prepare", images, str(data), *_flags(config.model_dump(exclude_defaults=True))]),
            *(shlex.join(["repa", *words]) for words in trainings),
            shlex.join(["repa", "report", *(str(folder / n) for n in RUNS), "--out", str(folder / PAGE)]),
        ]
        _write_page(folder, data, commands, time.perf_counter() - begin)
    _say_table(folder, time.perf_counter() - begin)
    _say_next(folder, data, is_own)
    return 0


def _train(trainings: list[list[str]], data: Path, extractor: str, num_steps: int) -> int:
    """Run the commands side by side, unless both runs are complete; returns an exit status."""
    if all(_is_finished(words) for words in trainings):
        say("", "Both runs are complete.")
        return 0
    _compute_reference(data, extractor)
    say(
        "",
        f"Training both runs side by side, {num_steps:,} steps each, with half of the cores each. This takes minutes.",
        f"Progress lines with the remaining time follow every {LINE_EVERY:.0f} s once both have started.",
    )
    return run_together(trainings)


def _say_next(folder: Path, data: Path, is_own: bool) -> None:
    program = _program()
    if not is_own:
        say("To do the same with 20 to 100,000 images of your own (a folder or zip, one folder per class):")
        say(f"  {shlex.join([*program, 'quickstart'])} FOLDER")
    elif _has_captions(data):
        say("The images have captions, which the quickstart does not use. To train on them (docs/text.md):")
        say(f"  {shlex.join([*program, 'prepare', str(data), '--only', 'text', '--text', TEXT])}")
        say(
            f"  {shlex.join([*program, 'train', 'quickstart-text', '--data', str(data), '--out', str(folder / 'text')])}"
        )


def crops() -> str:
    """The spec of the packaged photographs."""
    return f"{PHOTOGRAPHS}:num={NUM_CROPS},smallest={SMALLEST}"


def _choice(given: QuickstartArguments, recipe: TrainConfig, source: "Source") -> Choice:
    """Choose settings for your own images, and print them with their reasons."""
    choice = choose(source, recipe.num_steps, resolution=given.resolution, asked_steps=given.num_steps)
    names = source.class_names
    say(
        f"{given.source}: {len(source):,} images of {f'{len(names):,} classes' if len(names) > 1 else '1 class'}. Chosen:"
    )
    for reason in choice.reasons:
        say(f"  {reason}")
    return choice


def _for_photographs(given: QuickstartArguments) -> Choice:
    extractor, why = extractor_for(NUM_CROPS)
    say(f"Samples are evaluated in the features of {extractor}, {why}.")
    side = given.resolution or RESOLUTION
    changes = {**({} if side == RESOLUTION else patches_of(side)), "preview.features": extractor}
    return Choice(side, False, {**changes, **({"num_steps": given.num_steps} if given.num_steps else {})}, ())


def _compute_reference(data: Path, extractor: str) -> None:
    """Store features of the training images with the data, computed with all cores before both runs need them."""
    from repa.data import open_data
    from repa.evaluation import load_extractor, reference_of

    with ProgressBar(f"features of {extractor} for the training images", "images") as bar:
        reference_of(open_data(data), load_extractor(extractor), extractor, bar)


def _has_captions(data: Path) -> bool:
    from repa.data import open_data

    return bool(open_data(data).manifest.inventory.captioned)


def _is_finished(training: list[str]) -> bool:
    """Whether this command line of `repa train` has nothing left to do."""
    from repa.base import dist
    from repa.data import open_data
    from repa.training.resolve import is_finished

    given, config = train.of_recipe(train.TrainArguments, training[1:])
    return is_finished(config, open_data(given.data), Path(given.out), dist.own_device())


def _has_page(folder: Path) -> bool:
    """Whether there is a report newer than all log entries of the runs."""
    page, logs = folder / PAGE, [folder / name / layout.METRICS for name in RUNS]
    return all(path.is_file() for path in (page, *logs)) and page.stat().st_mtime_ns > max(
        log.stat().st_mtime_ns for log in logs
    )


def _program() -> list[str]:
    """The command that calls this program: `repa`, or how it was called if that is not on the PATH."""
    called = Path(sys.argv[0])
    return ["repa"] if shutil.which("repa") or called.name != "repa" else [str(called)]


def _flags(settings: dict[str, Any]) -> list[str]:
    """Settings as command-line options."""
    words: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, (tuple, list)) else [] if value is True else [value]
        words += [option(name), *map(str, values)]
    return words


def _write_page(folder: Path, data: Path, commands: list[str], seconds: float) -> None:
    import numpy as np

    from repa.base import files
    from repa.data import open_data
    from repa.report import machine_facts, write_report

    runs = [folder / name for name in RUNS]
    dataset = open_data(data)
    # One image of each class in turn, as in the previews: first the first of each class, then the second.
    by_class = np.argsort(dataset.labels, kind="stable")
    place = np.empty(len(by_class), np.int64)  # of an image among those of its class
    place[by_class] = np.arange(len(by_class)) - np.searchsorted(dataset.labels[by_class], dataset.labels[by_class])
    shown = np.lexsort((dataset.labels, place))[:16]
    names = dataset.class_names
    images = dataset.gather("images", shown).transpose(0, 2, 3, 1)  # (16, H, W, 3)
    captions = [names[label] for label in dataset.labels[shown]] if len(names) > 1 else []
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    write_report(
        runs, folder / PAGE, title="repa quickstart: the same SiT without and with alignment", names=list(RUNS),
        facts={
            **machine_facts(), "Time of this command": duration(seconds), "Its peak memory": files.size(_peak_memory()),
            "Size of its folder": files.size(size),
        },
        commands=commands, training_images=images, training_captions=captions,
    )  # fmt: skip


def _say_table(folder: Path, seconds: float) -> None:
    from repa.report import summary_table

    say()
    print_table(summary_table([folder / name for name in RUNS]))
    say("", f"Report: {folder / PAGE} (open it in a browser). This command took {duration(seconds)}.")


def print_table(rows: list[dict[str, str]]) -> None:
    """The report's summary in the terminal, a column per run."""
    from rich.console import Console
    from rich.table import Table

    heading, *keys = rows[0]
    table = Table("", *(row[heading] for row in rows))
    for key in keys:
        table.add_row(key, *(row[key] for row in rows))
    Console().print(table)


def _peak_memory() -> int:
    """Sum of the peak memory of this process and of both runs, in bytes."""
    import resource

    own, of_one = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = own + len(RUNS) * of_one
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
