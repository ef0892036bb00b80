"""`repa quickstart`: real images, the same SiT without and with alignment, one page that shows the difference."""

import sys
import time
from pathlib import Path

from pydantic import Field

from repa.base import extras
from repa.base.config import Config
from repa.cli import options, prepare, train
from repa.cli.console import duration, say
from repa.data.config import PrepareConfig
from repa.recipes import load_recipe

ABOUT = (
    "The whole main job on this machine, offline: random crops of real photographs -> prepared data -> the same SiT twice, without "
    "and with alignment, same seeds and budget -> samples, Fréchet distances -> report.html. Minutes on two CPU cores; "
    "the same command continues after any stop."
)
RESOLUTION = 32  # pixels
RUNS = {"baseline": "quickstart", "aligned": "quickstart-repa"}  # name of the run -> recipe


class QuickstartArguments(Config):
    out: str = "quickstart"
    """Folder for data, runs and page."""
    source: str = "photographs"
    """Images: the built-in photographs, or a folder or zip of class folders of your own."""
    num_steps: int = Field(0, ge=0)
    """Training steps of each run; 0 takes the recipe's."""
    seed: int = 0
    """Seed of everything."""


def main(argv: list[str]) -> int:
    given = options.parse(QuickstartArguments, argv, verb="quickstart", about=ABOUT)
    for package in ("jinja2", "matplotlib"):  # of the page, which comes last
        extras.need(package, "The quickstart", extra="quickstart")
    begin = time.perf_counter()
    folder = Path(given.out)
    data = folder / "data"
    changes = {"seed": given.seed, **({"num_steps": given.num_steps} if given.num_steps else {})}
    recipes = {name: load_recipe(recipe).override(**changes) for name, recipe in RUNS.items()}
    target = recipes["aligned"].alignments[0].target
    prepare.start(given.source, data, PrepareConfig(resolution=RESOLUTION, features=(target,)))
    for name, recipe in recipes.items():
        say()
        if stopped_by := train.start(recipe, data, folder / name):
            return 128 + stopped_by
    _report(folder, list(RUNS), data, target, given, time.perf_counter() - begin)
    return 0


def _report(
    folder: Path, names: list[str], data: Path, target: str, given: QuickstartArguments, seconds: float
) -> None:
    from repa.base import files
    from repa.data import open_data
    from repa.report import machine_facts, summary_table, write_report

    runs = [folder / name for name in names]
    dataset = open_data(data)
    images = dataset.gather("images", range(min(16, dataset.num_images))).transpose(0, 2, 3, 1)  # (16, H, W, 3)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    flags = "".join(
        f" --{k.replace('_', '-')} {v}"
        for k, v in given.model_dump().items()
        if v != type(given).model_fields[k].default
    )
    steps = f" --num-steps {given.num_steps}" if given.num_steps else ""
    commands = [
        f"repa quickstart{flags}",
        "# which is the same as",
        f"repa prepare {given.source} {data} --resolution {RESOLUTION} --features {target}",
        *(f"repa train {RUNS[n]} --data {data} --out {folder / n} --seed {given.seed}{steps}" for n in names),
        f"repa report {' '.join(map(str, runs))} --out {folder / 'report.html'}",
    ]
    page = write_report(
        runs, folder / "report.html", title="repa quickstart: the same SiT without and with alignment", names=names,
        facts={
            **machine_facts(), "Time of this command": duration(seconds), "Its peak memory": files.size(_peak_memory()),
            "Size of its folder": files.size(size),
        },
        commands=commands, training_images=images,
    )  # fmt: skip
    say()
    print_table(summary_table(runs))
    say(f"\n{page}: open it in a browser. Whole quickstart: {duration(seconds)}.")


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
    """Bytes that this process had in memory at most."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # bytes on macOS, KiB on Linux
