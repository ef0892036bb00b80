"""`repa analyse WHAT ...`: the analyses that write a table (cknna, probe, depth, encoders)."""

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from repa.analysis.config import (
    FOLDER,
    DepthConfig,
    EncodersConfig,
    ProbeConfig,
    RunCheckpoint,
    SimilarityConfig,
    checkpoints_of,
    meaning_of,
)
from repa.base.errors import UserError, choices
from repa.base.reporting import columns
from repa.cli import options, tables
from repa.cli.console import Bars, say, speaks
from repa.data.config import plain_name
from repa.encoders import ENCODERS, canonical
from repa.encoders.loading import LocalWeights

if TYPE_CHECKING:
    from repa.data import DataSet
    from repa.runs import LoadedRun

# what -> module of cli, sentence
WHATS = {
    "cknna": ("analyse", "similarity of hidden states to an encoder (CKNNA, CKA) at every depth and noise level"),
    "probe": ("analyse", "linear probes of hidden states at every depth and noise level, and of encoders"),
    "encoders": ("analyse", "which encoder to align to: structure, probe, similarity, speed and size"),
    "depth": ("analyse", "how much the prediction changes without a block"),
    "pictures": ("analyse_pictures", "tokens of a run and of encoders as colours, beside the images"),
    "progress": ("analyse_pictures", "samples of several checkpoints and runs from the same noise"),
    "neighbours": ("analyse_pictures", "the nearest training images of samples: has the model copied?"),
}
COLUMNS = {"run": "run", "step": "step|,", "t": "t|.2f", "depth": "depth"}  # of rows of runs
COLUMNS_OF_ENCODERS = {
    "encoder": "encoder", "dim": "channels", "grid": "grid", "lds": "LDS|.3f", "cds": "CDS|.4f", "rmsc": "RMSC|.3f",
    "top1": "top-1|.4f", "top5": "top-5|.4f", "images_per_second": "images/s|,.1f", "bytes_fp16": "fp16 B/image|,",
    "bytes_int8": "int8 B/image|,",
}  # fmt: skip


def usage() -> str:
    lines = columns([(f"  {what}", sentence) for what, (_, sentence) in WHATS.items()])
    return "\n".join(["usage: repa analyse WHAT ...        repa analyse WHAT --help prints the options", "", *lines])


def arguments_of(what: str) -> type[options.Command]:
    """Class with the options of `repa analyse what`."""
    return getattr(_module_of(what), f"{what.capitalize()}Arguments")


def _module_of(what: str) -> Any:
    if what not in WHATS:
        raise UserError(f"Unknown analysis {what!r}{choices(what, WHATS)}")
    return importlib.import_module(f"repa.cli.{WHATS[what][0]}")


def main(argv: list[str]) -> int:
    if not argv or argv[0] in options.HELP:
        print(usage())
        return 0
    with ExitStack() as held:  # the locks of the files that are written
        return getattr(_module_of(argv[0]), argv[0])(argv[1:], held)


class NetworksArguments(options.WeightsOfRun):
    positional = ("runs...",)

    runs: options.RunFolders = Field(min_length=1)
    """run folders"""
    data: options.DataFolder
    """Folder of prepared data."""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints; empty: the newest."""
    out: str = ""
    """Name of the .json; the .csv and .png are written beside it. Empty: the folder analysis of the first run."""


class CknnaArguments(NetworksArguments, SimilarityConfig):
    """Similarity of hidden states to an encoder's tokens (CKNNA, CKA), by depth, noise level and checkpoint. Writes a
    table (.json, .csv) and curves (.png).
    """

    verb = "analyse cknna"


class DepthArguments(NetworksArguments, DepthConfig):
    """Change of the prediction without one block, by depth and noise level: which blocks the network uses most. Writes
    a table (.json, .csv) and curves (.png).
    """

    verb = "analyse depth"


class ProbeArguments(NetworksArguments, ProbeConfig):
    """Accuracy of linear classifiers on frozen features: hidden states of runs, or an encoder named instead of a run.
    Writes a table (.json, .csv) and curves (.png).
    """

    verb = "analyse probe"

    runs: tuple[str, ...] = Field(min_length=1)
    """run folders, or encoders by name"""
    val: options.DataFolder = ""
    """Folder of prepared data for testing; empty: a fifth of --data."""
    encoder_weights: LocalWeights = Field({})
    """Local weights of encoders, written ENCODER=PATH."""

    @property
    def encoders(self) -> list[str]:
        """Names in `runs` that are not run folders."""
        return [name for name in self.runs if not Path(name).is_dir()]

    def idle(self) -> dict[str, str]:
        of_runs = ("depths", "times", "weights", "checkpoints", "autoencoder_weights")
        if len(self.encoders) == len(self.runs):
            return dict.fromkeys(of_runs, "without a run folder")
        return {} if self.encoders else {"encoder_weights": "without an encoder in place of a run"}


class EncodersArguments(EncodersConfig, options.Command):
    """Compare encoders as alignment targets: spatial structure (LDS, CDS, RMSC; higher values predicted better FIDs in
    arXiv 2512.10794), linear probe, similarity to each other, speed on this machine, and size of stored tokens.
    """

    verb = "analyse encoders"
    positional = ("data",)

    data: options.DataFolder
    """folder of prepared data"""
    val: options.DataFolder = ""
    """Folder of prepared data for testing the probe; empty: a fifth of the images."""
    out: str = ""
    """Name of a .json; the .csv is written beside it. Empty: only print."""


def cknna(argv: list[str], held: ExitStack) -> int:
    given = options.parse(CknnaArguments, argv)
    config = options.part(SimilarityConfig, given)
    # Variants are not comparable, so each has its own file.
    variant = config.variant if config.measure == "cknna" and config.variant != "paper" else ""
    checkpoints = checkpoints_of(given.runs, given.checkpoints)
    name = f"{config.measure}{variant and '-' + variant}-{plain_name(config.encoder)}.json"
    out = tables.output(held, given.out, Path(given.runs[0]) / FOLDER / name)
    from repa.analysis import cknna_of_run
    from repa.analysis.hidden import spaced_rows
    from repa.data import open_data

    rows = _rows_of_each(
        checkpoints, given, lambda run, data, name, bars: cknna_of_run(run, data, config, bars.of(name))
    )
    num = len(spaced_rows(open_data(given.data), config.num_images))  # which may be fewer than were asked for
    how = {**tables.how(config.measure, given), "num_images": num}
    if config.measure == "cknna":
        how["chance"] = config.neighbours / num
    tables.write(out, how, rows)
    title = config.measure.upper().replace("-UNBIASED", ", unbiased") + (variant and f" ({variant})")
    say(*tables.in_columns(rows, {**COLUMNS, config.measure: f"{title}|.4f"}))
    say(meaning_of(config.measure, how.get("chance")))
    return _draw_depths(rows, config.measure, f"{title} with {config.encoder}", out)


def depth(argv: list[str], held: ExitStack) -> int:
    given = options.parse(DepthArguments, argv)
    config = options.part(DepthConfig, given)
    checkpoints = checkpoints_of(given.runs, given.checkpoints)
    out = tables.output(held, given.out, Path(given.runs[0]) / FOLDER / "depth.json")
    from repa.analysis import depth_effects

    rows = _rows_of_each(
        checkpoints, given, lambda run, data, name, bars: depth_effects(run, data, config, bars.of(name))
    )
    tables.write(out, tables.how("depth", given), rows)
    say(*tables.in_columns(rows, {**COLUMNS, "change": "change|.4f", "share": "share|.1%"}))
    return _draw_depths(rows, "change", "change of the prediction without the block", out)


def probe(argv: list[str], held: ExitStack) -> int:
    given = options.parse(ProbeArguments, argv)
    config = options.part(ProbeConfig, given)
    for name in given.encoders:
        if "/" in name:  # a mistyped folder, which no encoder is called like
            raise UserError(f"There is no run folder {name}: give the --out folder of `repa train`.")
        ENCODERS.check(name)
    runs = [name for name in given.runs if name not in given.encoders]
    checkpoints = checkpoints_of(runs, given.checkpoints)
    if not runs and not given.out:
        raise UserError(
            "A probe of encoders alone has no run folder to write to: give a file, such as --out probe.json."
        )
    out = tables.output(held, given.out, Path(runs[0] if runs else "") / FOLDER / "probe.json")
    from repa.analysis import probe_of_encoder, probe_of_run
    from repa.analysis.collection import best
    from repa.base import dist
    from repa.data import open_checked
    from repa.data.dataset import load_encoder_of

    device = dist.setup()
    val = open_checked(given.val) if given.val else None
    rows = _rows_of_each(
        checkpoints,
        given,
        lambda run, data, name, bars: probe_of_run(
            run, data, config, val, bars.of(name), bars.of(f"heads of {name}", "epochs")
        ),
    )
    data = open_checked(given.data)
    for spec in given.encoders:
        encoder = load_encoder_of(data, spec, weights=given.encoder_weights.get(canonical(spec)), device=device)
        with Bars() as bars:
            progress = bars.of(spec), bars.of(f"heads of {spec}", "epochs")
            found = probe_of_encoder(encoder, spec, data, config, val, *progress)
        rows += [{"run": spec, "step": None, "t": None, "depth": None, **row} for row in found]
    counts = (val or data).manifest.class_counts
    how = {**tables.how("probe", given), "chance": max(counts) / sum(counts)}
    tables.write(out, how, rows)
    shown = best(rows, "top1")
    _say_probes(shown, how["chance"], len(config.learning_rates), out)
    return _draw_depths(shown, "top1", "top-1 accuracy", out)


def _say_probes(shown: list[dict[str, Any]], chance: float, num_rates: int, out: Path) -> None:
    """One line per block and noise level: the learning rates are a search grid, and only the files hold all of them."""
    columns = {**COLUMNS, "features": "features", "top1": "top-1|.4f", "top5": "top-5|.4f"}
    columns |= {"lr": "lr|g"} if num_rates > 1 else {}
    # Encoders have no steps, noise levels and blocks; runs have no kinds of features.
    used = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in shown)}
    say(*tables.in_columns(shown, used), meaning_of("probe", chance))
    if num_rates > 1:
        say(
            f"the best of {num_rates} learning rates on the test images, which is a little optimistic; all are in {out}"
        )


def encoders(argv: list[str], held: ExitStack) -> int:
    given = options.parse(EncodersArguments, argv)
    config = options.part(EncodersConfig, given)
    out = tables.output(held, given.out, Path()) if given.out else None
    from repa.analysis import compare_encoders
    from repa.analysis.hidden import spaced_rows
    from repa.base import dist
    from repa.data import open_checked

    device, data = dist.setup(), open_checked(given.data)
    val = open_checked(given.val) if given.val else None
    with Bars() as bars:
        shown, heads = bars.of(f"encoders on {given.data}"), bars.of("their heads", "epochs")
        found = compare_encoders(data, config, val=val, device=device, progress=shown, heads_progress=heads)
    say(*tables.in_columns(found.encoders, COLUMNS_OF_ENCODERS))
    if len(config.encoders) > 1:
        say("", f"CKNNA ({config.variant}, k = {config.neighbours}) to each other")
        columns = {"encoder": "encoder", **{name: f"{name}|.4f" for name in config.encoders}}
        say(*tables.in_columns(found.matrix(), columns))
        say(meaning_of("cknna", config.neighbours / len(spaced_rows(data, config.num_images))))
    if out is not None:
        tables.write(out, {**tables.how("encoders", given), "device": str(device)}, found.rows())
        say(f"{out} and .csv.")
    return 0


def _rows_of_each(
    checkpoints: list[RunCheckpoint],
    given: NetworksArguments,
    find: "Callable[[LoadedRun, DataSet, str, Bars], list[dict[str, Any]]]",
) -> list[dict[str, Any]]:
    """Rows {run, step, ...}: the results of `find(run, data, name, bars)` for each checkpoint."""
    from repa.base import dist
    from repa.data import open_checked

    device, data = dist.setup(), open_checked(given.data)
    rows = []
    for each in checkpoints:
        run = each.load(given.weights, given.autoencoder_weights, device)
        with Bars() as bars:
            found = find(run, data, f"{each.label}, step {run.step:,}", bars)
        rows += [{"run": each.label, "step": run.step, **row} for row in found]
    return rows


def _draw_depths(rows: list[dict[str, Any]], value: str, label: str, out: Path) -> int:
    """Plot curves over depth beside the table; rows of encoders alone have no depth and no plot."""
    if not speaks():
        return 0
    if any(row["depth"] is not None for row in rows):
        from repa.report.analyses import depth_figure
        from repa.report.style import write_png

        write_png(depth_figure(rows, value, label), out.with_suffix(".png"))
        say(f"{out}, .csv and .png.")
    else:
        say(f"{out} and .csv.")
    return 0
