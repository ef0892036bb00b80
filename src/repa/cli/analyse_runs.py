"""`repa analyse cknna RUN...`, `repa analyse depth RUN...` and `repa analyse probe RUN|ENCODER...`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa.analysis.checkpoints import RunCheckpoint, checkpoints_of
from repa.analysis.config import FOLDER, DepthConfig, ImagesConfig, ProbeConfig, SimilarityConfig
from repa.base.errors import UserError
from repa.cli import options, tables
from repa.cli.console import Bars, ProgressBar, say, speaks
from repa.encoders import ENCODERS
from repa.encoders.loading import check_pairs, weights_for

COLUMNS = {"run": "run", "step": "step|,", "t": "t|.2f", "depth": "depth"}  # of every row

ABOUT_CKNNA = (
    "How alike the neighbourhoods of hidden states are to those of an encoder's tokens, for every depth, noise level and "
    "checkpoint asked for. Writes rows (.json, .csv) and curves (.png)."
)
ABOUT_DEPTH = (
    "How far the prediction moves when one block is left out, for every depth and noise level: which blocks matter, and so where "
    "to align. Writes rows (.json, .csv) and curves (.png)."
)
ABOUT_PROBE = (
    "Accuracy of linear classifiers on frozen features: hidden states of runs, or an encoder named in place of a run. "
    "Writes rows (.json, .csv) and curves (.png)."
)


class NetworksArguments(options.WeightsOfRun):
    runs: tuple[str, ...] = ()
    """run folders"""
    data: str
    """Folder of prepared data."""
    checkpoints: tuple[int, ...] = ()
    """Steps of checkpoints; empty takes the newest."""
    out: str = ""
    """Name of the .json. The .csv and .png are written next to it. Empty: in the folder analysis of the first run."""


class CknnaArguments(NetworksArguments, SimilarityConfig):
    pass


class DepthArguments(NetworksArguments, DepthConfig):
    pass


class ProbeArguments(NetworksArguments, ProbeConfig):
    val: str = ""
    """Folder of prepared data to test on; empty keeps a fifth of --data for it."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of encoders, written ENCODER=PATH."""

    @property
    def encoders(self) -> list[str]:
        """What is named in place of runs."""
        return [name for name in self.runs if not Path(name).is_dir()]

    def idle(self) -> dict[str, str]:
        of_runs = ("depths", "times", "weights", "checkpoints", "autoencoder_weights")
        if self.runs and len(self.encoders) == len(self.runs):
            return dict.fromkeys(of_runs, "without a run folder")
        return {} if self.encoders else {"encoder_weights": "without an encoder named in place of a run"}


def cknna(argv: list[str]) -> int:
    given = options.parse(CknnaArguments, argv, verb="analyse cknna", about=ABOUT_CKNNA, positional=("runs...",))
    config = options.part(SimilarityConfig, given)
    # Another variant is another number: never under the same name.
    variant = config.variant if config.measure == "cknna" and config.variant != "paper" else ""
    checkpoints = asked_for(given, "cknna")
    name = f"{config.measure}{variant and '-' + variant}-{tables.plain(config.encoder)}.json"
    out = tables.output(given.out, Path(given.runs[0]) / FOLDER / name)
    from repa.analysis import cknna_of_run

    rows = rows_of_each(checkpoints, given, lambda run, data, bar: cknna_of_run(run, data, config, bar))
    tables.write(out, tables.how(config.measure, given), rows)
    title = config.measure.upper().replace("-UNBIASED", ", unbiased") + (variant and f" ({variant})")
    say(*tables.in_columns(rows, {**COLUMNS, config.measure: f"{title}|.4f"}))
    draw_depths(rows, config.measure, f"{title} with {config.encoder}", out)
    return 0


def depth(argv: list[str]) -> int:
    given = options.parse(DepthArguments, argv, verb="analyse depth", about=ABOUT_DEPTH, positional=("runs...",))
    config = options.part(DepthConfig, given)
    checkpoints = asked_for(given, "depth")
    out = tables.output(given.out, Path(given.runs[0]) / FOLDER / "depth.json")
    from repa.analysis import depth_effects

    rows = rows_of_each(checkpoints, given, lambda run, data, bar: depth_effects(run, data, config, bar))
    tables.write(out, tables.how("depth", given), rows)
    say(*tables.in_columns(rows, {**COLUMNS, "change": "change|.4f", "share": "share|.1%"}))
    draw_depths(rows, "change", "change of the prediction without the block", out)
    return 0


def probe(argv: list[str]) -> int:
    given = options.parse(ProbeArguments, argv, verb="analyse probe", about=ABOUT_PROBE, positional=("runs...",))
    config = options.part(ProbeConfig, given)
    check_pairs(given.encoder_weights)
    if not given.runs:
        raise UserError("`repa analyse probe` needs a run folder or an encoder: see `repa analyse probe --help`.")
    for name in (encoders := given.encoders):
        if "/" in name:
            raise UserError(f"There is no run folder {name}: give the --out folder of a `repa train`.")
        ENCODERS.check(name)
    runs = [name for name in given.runs if name not in encoders]
    checkpoints = checkpoints_of(runs, given.checkpoints)
    if not runs and not given.out:
        raise UserError(
            "The probe of encoders alone lies in no run folder: say where to write it, as in --out probe.json."
        )
    out = tables.output(given.out, Path(runs[0] if runs else "") / FOLDER / "probe.json")
    from repa.analysis import probe_of_encoder, probe_of_run
    from repa.analysis.collection import best
    from repa.base import dist
    from repa.data import open_data
    from repa.data.dataset import load_encoder_of

    device, data = dist.setup(), open_data(given.data)
    val = open_data(given.val) if given.val else None
    rows: list[dict[str, Any]] = []
    for each in checkpoints:
        run = each.load(given.weights, given.autoencoder_weights, device)
        name = f"{each.label}, step {run.step:,}"
        with Bars() as bars:
            found = probe_of_run(run, data, config, val, bars.of(name), bars.of(f"heads of {name}", "epochs"))
        rows += [{"run": each.label, "step": run.step, **row} for row in found]
    images = options.part(ImagesConfig, given)
    for spec in encoders:
        encoder = load_encoder_of(data, spec, weights=weights_for(spec, given.encoder_weights), device=device)
        with Bars() as bars:
            found = probe_of_encoder(
                encoder, spec, data, images, config, seed=config.seed, val=val, progress=bars.of(spec),
                heads_progress=bars.of(f"heads of {spec}", "epochs"),
            )  # fmt: skip
        rows += [{"run": spec, "step": None, "t": None, "depth": None, **row} for row in found]
    tables.write(out, tables.how("probe", given), rows)
    # One line for each place: the rates are a grid over which a head is chosen, and only files hold them all.
    shown = best(rows, "top1")
    columns = {**COLUMNS, "features": "features", "top1": "top-1|.4f", "top5": "top-5|.4f", "lr": "lr|g"}
    used = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in shown)}
    num_rates = len(config.learning_rates)
    if num_rates == 1:
        used.pop("lr")
    say(*tables.in_columns(shown, used))
    if num_rates > 1:
        say(f"the best of {num_rates} learning rates on the test images, so a little optimistic; all are in {out}")
    draw_depths(shown, "top1", "top-1 accuracy", out)
    return 0


def asked_for(given: NetworksArguments, what: str) -> list[RunCheckpoint]:
    """The checkpoints of the runs given, of which there must be one."""
    if not given.runs:
        raise UserError(f"`repa analyse {what}` needs at least one run folder: see `repa analyse {what} --help`.")
    return checkpoints_of(given.runs, given.checkpoints)


def rows_of_each(checkpoints: list[RunCheckpoint], given: NetworksArguments, rows_of: Callable) -> list[dict[str, Any]]:
    """{run, step, ...}: what `rows_of` (run, data, progress) finds in each checkpoint, with a bar for each."""
    from repa.base import dist
    from repa.data import open_data

    device, data = dist.setup(), open_data(given.data)
    rows = []
    for each in checkpoints:
        run = each.load(given.weights, given.autoencoder_weights, device)
        with ProgressBar(f"{each.label}, step {run.step:,}", "images") as bar:
            rows += [{"run": each.label, "step": run.step, **row} for row in rows_of(run, data, bar)]
    return rows


def draw_depths(rows: list[dict[str, Any]], value: str, label: str, out: Path) -> None:
    """A curve over depths next to the rows; rows of encoders alone have no depth and no picture."""
    if not speaks():
        return
    if any(row["depth"] is not None for row in rows):
        from repa.report.analyses import depth_figure
        from repa.report.style import write_png

        write_png(depth_figure(rows, value, label), out.with_suffix(".png"))
        say(f"{out}, .csv, and .png, which shows it.")
    else:
        say(f"{out} and .csv.")
