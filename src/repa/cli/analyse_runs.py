"""`repa analyse cknna RUN...`, `repa analyse depth RUN...` and `repa analyse probe RUN|ENCODER...`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repa.analysis.config import FOLDER, DepthConfig, ImagesConfig, ProbeConfig, SimilarityConfig
from repa.base.config import Config
from repa.base.errors import UserError
from repa.cli import options, tables
from repa.cli.console import Bars, Progress, say, speaks
from repa.encoders import ENCODERS
from repa.encoders.loading import check_pairs, weights_for

if TYPE_CHECKING:
    import torch

    from repa.runs import LoadedRun

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


class NetworksArguments(Config):
    runs: tuple[str, ...] = ()
    """run folders"""
    data: str
    """Folder of prepared data."""
    weights: str = "ema"
    """Averaged weights (ema), the raw ones (model), or another average by its name."""
    checkpoints: tuple[int, ...] = ()
    """Steps of checkpoints; empty takes the newest."""
    autoencoder_weights: str = ""
    """Where the weights of the run's autoencoder lie now; empty: where training found them, else the hub's."""
    out: str = ""
    """Name of the .json; .csv and .png lie beside it. Empty: in the folder analysis of the first run."""


class CknnaArguments(NetworksArguments, SimilarityConfig):
    pass


class DepthArguments(NetworksArguments, DepthConfig):
    pass


class ProbeArguments(NetworksArguments, ProbeConfig):
    val: str = ""
    """Folder of prepared data to test on; empty keeps a fifth of --data for it."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of encoders, written ENCODER=PATH."""


def cknna(argv: list[str]) -> int:
    given = options.parse(CknnaArguments, argv, verb="analyse cknna", about=ABOUT_CKNNA, positional=("runs...",))
    config = options.part(SimilarityConfig, given)
    if not given.runs:
        raise UserError("`repa analyse cknna` needs at least one run folder: see `repa analyse cknna --help`.")
    networks = networks_of(given.runs, given.checkpoints)
    # another variant is another number: never under the same name
    variant = config.variant if config.measure == "cknna" and config.variant != "paper" else ""
    name = f"{config.measure}{variant and '-' + variant}-{tables.plain(config.encoder)}.json"
    out = tables.output(given.out, _folder(given.runs[0]) / name)
    from repa.analysis import cknna_of_run
    from repa.base import dist
    from repa.data import open_data

    device, data = dist.setup(), open_data(given.data)
    rows = []
    for label, run in loaded(networks, given, device):
        with Progress(f"{label}, step {run.step:,}", "images") as bar:
            rows += [{"run": label, "step": run.step, **row} for row in cknna_of_run(run, data, config, bar)]
    tables.write(out, _how(given, config.measure), rows)
    title = config.measure.upper().replace("-UNBIASED", ", unbiased") + (variant and f" ({variant})")
    columns = {"run": "run", "step": "step|,", "t": "t|.2f", "depth": "depth", config.measure: f"{title}|.4f"}
    say(tables.text(rows, columns))
    _draw(rows, config.measure, f"{title} with {config.encoder}", out)
    return 0


def depth(argv: list[str]) -> int:
    given = options.parse(DepthArguments, argv, verb="analyse depth", about=ABOUT_DEPTH, positional=("runs...",))
    config = options.part(DepthConfig, given)
    if not given.runs:
        raise UserError("`repa analyse depth` needs at least one run folder: see `repa analyse depth --help`.")
    networks = networks_of(given.runs, given.checkpoints)
    out = tables.output(given.out, _folder(given.runs[0]) / "depth.json")
    from repa.analysis import depth_effects
    from repa.base import dist
    from repa.data import open_data

    device, data = dist.setup(), open_data(given.data)
    rows = []
    for label, run in loaded(networks, given, device):
        with Progress(f"{label}, step {run.step:,}", "images") as bar:
            rows += [{"run": label, "step": run.step, **row} for row in depth_effects(run, data, config, bar)]
    tables.write(out, _how(given, "depth"), rows)
    columns = {
        "run": "run",
        "step": "step|,",
        "t": "t|.2f",
        "depth": "depth",
        "change": "change|.4f",
        "share": "share|.1%",
    }
    say(tables.text(rows, columns))
    _draw(rows, "change", "change of the prediction without the block", out)
    return 0


def probe(argv: list[str]) -> int:
    given = options.parse(ProbeArguments, argv, verb="analyse probe", about=ABOUT_PROBE, positional=("runs...",))
    config = options.part(ProbeConfig, given)
    check_pairs(given.encoder_weights)
    if not given.runs:
        raise UserError("`repa analyse probe` needs a run folder or an encoder: see `repa analyse probe --help`.")
    encoders = [name for name in given.runs if not Path(name).is_dir()]
    for name in encoders:
        if "/" in name:
            raise UserError(f"There is no run folder {name}: give the --out folder of a `repa train`.")
        ENCODERS.check(name)
    runs = [name for name in given.runs if name not in encoders]
    networks = networks_of(runs, given.checkpoints)
    if not runs and not given.out:
        raise UserError(
            "The probe of encoders alone lies in no run folder: say where to write it, as in --out probe.json."
        )
    out = tables.output(given.out, _folder(runs[0] if runs else "") / "probe.json")
    from repa.analysis import probe_of_encoder, probe_of_run
    from repa.base import dist
    from repa.data import open_data
    from repa.data.dataset import load_encoder_of

    device, data = dist.setup(), open_data(given.data)
    val = open_data(given.val) if given.val else None
    rows: list[dict[str, Any]] = []
    for label, run in loaded(networks, given, device):
        name = f"{label}, step {run.step:,}"
        with Bars() as bars:
            found = probe_of_run(run, data, config, val, bars.of(name), bars.of(f"heads of {name}", "epochs"))
        rows += [{"run": label, "step": run.step, **row} for row in found]
    images = options.part(ImagesConfig, given)
    for spec in encoders:
        encoder = load_encoder_of(data, spec, weights=weights_for(spec, given.encoder_weights), device=device)
        with Bars() as bars:
            found = probe_of_encoder(
                encoder, spec, data, images, config, seed=config.seed, val=val, progress=bars.of(spec),
                heads_progress=bars.of(f"heads of {spec}", "epochs"),
            )  # fmt: skip
        rows += [{"run": spec, "step": None, "t": None, "depth": None, **row} for row in found]
    tables.write(out, _how(given, "probe"), rows)
    best = best_rates(rows)
    columns = {"run": "run", "step": "step|,", "t": "t|.2f", "depth": "depth", "features": "features", "top1": "top-1|.4f",
               "top5": "top-5|.4f", "lr": "lr|g"}  # fmt: skip
    used = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in best)}
    if len(config.learning_rates) == 1:
        used.pop("lr")
    say(tables.text(best, used))
    if len(config.learning_rates) > 1:
        say(
            f"the best of {len(config.learning_rates)} learning rates on the test images, so a little optimistic; all are in {out}"
        )
    _draw(best, "top1", "top-1 accuracy", out)
    return 0


def best_rates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the learning rate with the highest accuracy, in place."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("run", "step", "t", "depth", "features"))
        if key not in best or row["top1"] > best[key]["top1"]:
            best[key] = row
    return list(best.values())


def networks_of(runs: Sequence[str], checkpoints: Sequence[int]) -> list[tuple[str, Path, int]]:
    """(label, folder, step) of every checkpoint asked for; refuses runs and checkpoints that do not exist."""
    from repa.runs import layout

    names = [Path(run).resolve().name for run in runs]
    found = []
    for run, name in zip(map(Path, runs), names, strict=True):
        layout.read_config(run)
        steps = layout.checkpoint_steps(run)
        if not steps:
            raise UserError(f"{run} has no checkpoint yet: train it first (repa train ... --out {run}).")
        if missing := [step for step in checkpoints if step not in steps]:
            raise UserError(f"{run} has no checkpoint of step {missing[0]}: there are {', '.join(map(str, steps))}.")
        label = name if names.count(name) == 1 else str(run)
        found += [(label, run, step) for step in checkpoints or steps[-1:]]
    return found


def loaded(
    networks: list[tuple[str, Path, int]], given: Any, device: "torch.device"
) -> Iterator[tuple[str, "LoadedRun"]]:
    from repa.runs import load_run

    for label, folder, step in networks:
        yield (
            label,
            load_run(folder, given.weights, step=step, autoencoder_weights=given.autoencoder_weights, device=device),
        )


def _folder(run: str) -> Path:
    return Path(run) / FOLDER


def _how(given: NetworksArguments, what: str) -> dict[str, Any]:
    """What the file says of how its rows were made."""
    from repa import __version__

    return {"analysis": what, **given.model_dump(mode="json", exclude={"out", "cache"}), "repa": __version__}


def _draw(rows: list[dict[str, Any]], value: str, label: str, out: Path) -> None:
    if not speaks():
        return
    if any(row["depth"] is not None for row in rows):
        from repa.report.analyses import depth_figure
        from repa.report.style import save_png

        save_png(depth_figure(rows, value, label), out.with_suffix(".png"))
        say(f"{out}, .csv, and .png, which shows it.")
    else:
        say(f"{out} and .csv.")
