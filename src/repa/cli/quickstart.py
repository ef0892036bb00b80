"""`repa quickstart`: real images, the same SiT without and with alignment, one page that shows the difference."""

import shlex
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from repa.base import extras
from repa.base.config import option
from repa.base.reporting import columns, duration
from repa.cli import options, prepare, train
from repa.cli.console import LINE_EVERY, ProgressBar, say
from repa.cli.together import run_together
from repa.data.config import PrepareConfig
from repa.recipes import load_recipe
from repa.recipes.small import RESOLUTION, Choice, choose, extractor_for, patches_of
from repa.runs import layout
from repa.training.config import TrainConfig

RUNS = {"baseline": "quickstart", "aligned": "quickstart-repa"}  # name of the run -> recipe
PAGE = "report.html"
PHOTOGRAPHS = "photographs"
GRID = 8  # side of the token grid of both sizes, for the target's features
NUM_CROPS = 4_000  # of the photographs: an eighth of what a run sees, and their features are computed for the distances
SMALLEST = 0.8  # side of the smallest crops over the photograph's: of smaller ones a short training shows only texture


class QuickstartArguments(options.Command):
    """The whole comparison on this machine, offline: random crops of real photographs -> prepared data -> the same SiT
    twice, without and with alignment, same seeds and budget -> samples, Fréchet distances -> report.html. Minutes
    on two CPU cores; the same command continues after any stop. With --source the same on images of your own.
    """

    verb = "quickstart"

    out: str = ""
    """Folder for data, runs and page; empty takes quickstart, and for your own images quickstart-NAME."""
    source: str = PHOTOGRAPHS
    """Images: the photographs inside the package, or a folder or zip of 20 to 100,000 of your own; folders inside are classes."""
    labels: str = ""
    """Where classes of your own images come from, as in `repa prepare --labels`; empty for the source's own."""
    resolution: Literal[0, 32, 64] = 0
    """Side of the images in pixels; 0 takes 32, where a few minutes of training show the most."""
    num_steps: int = Field(0, ge=0)
    """Training steps of each run; 0 chooses by the data."""
    seed: int = 0
    """Seed of everything."""


def main(argv: list[str]) -> int:
    given = options.parse(QuickstartArguments, argv)
    for package in ("jinja2", "matplotlib"):  # of the page, which comes last
        extras.need(package, "The quickstart", extra="quickstart")
    begin = time.perf_counter()
    is_own = given.source != PHOTOGRAPHS
    folder = Path(given.out or (f"quickstart-{Path(given.source).resolve().stem}" if is_own else "quickstart"))
    data = folder / "data"
    source = given.source if is_own else crops()
    recipes = {name: load_recipe(recipe) for name, recipe in RUNS.items()}
    target = recipes["aligned"].alignments[0].target
    choice = _choice(given, recipes["baseline"]) if is_own else _for_photographs(given)
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
    if all(_is_finished(words) for words in trainings):
        say("", "Both trainings are complete.")
    else:
        _compute_reference(data, choice.changes["preview.features"])
        say(
            "",
            f"Both trainings side by side, {choice.changes.get('num_steps', recipes['baseline'].num_steps):,} steps each, on half of "
            "the cores each: minutes.",
            f"The first line of progress comes once both have started, then one every {LINE_EVERY:.0f} s with the time that is left.",
        )
        if code := run_together(trainings):
            return code
    commands = [
        shlex.join([*_program(), "quickstart", *_flags(given.model_dump(exclude_defaults=True))]),
        "# which is the same as",
        shlex.join(["repa", "prepare", source, str(data), *_flags(config.model_dump(exclude_defaults=True))]),
        *(shlex.join(["repa", *words]) for words in trainings),
        shlex.join(["repa", "report", *(str(folder / n) for n in RUNS), "--out", str(folder / PAGE)]),
    ]
    if not _has_page(folder):
        say("Drawing the page.")
        _write_page(folder, data, commands, time.perf_counter() - begin)
    _say_table(folder, time.perf_counter() - begin)
    if not is_own:
        say("The same with your own images, a folder or zip of 20 to 100,000 (folders inside are classes):")
        say(f"  {shlex.join([*_program(), 'quickstart', '--source'])} FOLDER")
    return 0


def crops() -> str:
    """The source of the quickstart's own images."""
    return f"{PHOTOGRAPHS}:num={NUM_CROPS},smallest={SMALLEST}"


def _choice(given: QuickstartArguments, recipe: TrainConfig) -> Choice:
    """Settings for your own images, printed with their reasons."""
    from repa.data import open_source

    source = open_source(given.source, labels=given.labels)
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
    say(f"Samples are measured in the features of {extractor}, {why}.")
    side = given.resolution or RESOLUTION
    changes = {**({} if side == RESOLUTION else patches_of(side)), "preview.features": extractor}
    return Choice(side, False, {**changes, **({"num_steps": given.num_steps} if given.num_steps else {})}, ())


def _compute_reference(data: Path, extractor: str) -> None:
    """Features of the training images, kept with the data: computed with all cores, before both runs need them."""
    from repa.data import open_data
    from repa.evaluation import load_extractor, reference_of

    with ProgressBar(f"computing features of {extractor} for the training images, once for both runs", "images") as bar:
        reference_of(open_data(data), load_extractor(extractor), extractor, bar)


def _is_finished(training: list[str]) -> bool:
    """Is nothing left to do for this command line of `repa train`?"""
    from repa.base import dist
    from repa.data import open_data
    from repa.training.resolve import is_finished

    given, config = train.of_recipe(train.TrainArguments, training[1:])
    return is_finished(config, open_data(given.data), Path(given.out), dist.own_device())


def _has_page(folder: Path) -> bool:
    """Is there a page, younger than all that the runs logged?"""
    page, logs = folder / PAGE, [folder / name / layout.METRICS for name in RUNS]
    return all(path.is_file() for path in (page, *logs)) and page.stat().st_mtime_ns > max(
        log.stat().st_mtime_ns for log in logs
    )


def _program() -> list[str]:
    """How to call this program again: as it was called where it is not on the PATH."""
    called = Path(sys.argv[0])
    return ["repa"] if shutil.which("repa") or called.name != "repa" else [str(called)]


def _flags(settings: dict[str, Any]) -> list[str]:
    """Settings as options of a verb."""
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
    # An image of each class first, in the order in which the previews draw them, then others up to as many as a preview has.
    first = np.unique(dataset.labels, return_index=True)[1]
    shown = np.concatenate([first, np.setdiff1d(np.arange(len(dataset.labels)), first)])[:16]
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

    rows = summary_table([folder / name for name in RUNS])
    say("", *columns([[key, *(row[key] for row in rows)] for key in rows[0]]))
    say("", f"{folder / PAGE}: open it in a browser. This command took {duration(seconds)}.")


def _peak_memory() -> int:
    """Bytes that this process and both trainings had in memory, as if all had needed most at once."""
    import resource

    own, of_one = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    peak = own + len(RUNS) * of_one
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
