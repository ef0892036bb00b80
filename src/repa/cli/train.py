"""`repa train RECIPE --data DATA --out RUN [overrides]`."""

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from repa.base import launch, trust
from repa.base.config import OnDisk, refuse_idle
from repa.cli import options
from repa.cli.console import ProgressBar, say
from repa.evaluation.config import EvaluateConfig
from repa.models.config import reads_text
from repa.recipes import load_recipe
from repa.runs import layout
from repa.training.config import TrainConfig

if TYPE_CHECKING:
    from repa.training.state import TrainState


MANY_PASSES = 1_000  # passes over the data above which a run is likely to memorise images


class TrainArguments(TrainConfig, options.Command):
    """Train a recipe (a name from `repa list recipes`, a .yaml file, or the configuration of a run folder) on prepared
    data. If interrupted, run the same command again: it continues. A larger --num-steps trains longer. The values shown
    are those of the recipe, if you give one. Alignments have numbers from 0; the next number adds one:
    --alignments.0.target dinov2-b --alignments.0.depth 8 --alignments.0.weight 0.5 (docs/training.md).
    """

    verb = "train"
    positional = ("recipe",)

    recipe: str
    """recipe name, .yaml file, or run folder"""
    data: options.DataFolder
    """Folder of prepared data, or the URL of a copy of it such as s3://bucket/data."""
    out: Annotated[str, OnDisk(layout.require_run_or_empty)]
    """Run folder."""

    def idle(self) -> dict[str, str]:
        return super().idle() | ({} if launch.place().world > 1 else {"parallel": "with one process"})


def main(argv: list[str]) -> int:
    given, config = of_recipe(TrainArguments, argv)
    if config.preview.scored_every:
        EvaluateConfig.parse({"features": config.preview.features, "metrics": config.preview.metrics}, where="preview")
    if launch.place().world == 1 and not layout.checkpoint_steps(Path(given.out)):
        config.require_init()
    typed = options.names_given(TrainArguments, argv)
    again = _again([*argv, *_trusted(config, argv)])
    stopped_by = start(config, given.data, Path(given.out), command=again, typed=typed)
    # Schedulers end a job by SIGTERM. The checkpoint is written, so this is not a failure.
    return 130 if stopped_by == signal.SIGINT else 0


def _trusted(config: TrainConfig, argv: list[str]) -> list[str]:
    """The options --trust that the same command needs to continue the run."""
    paths = {"init", "autoencoder_weights", "feature_weights", "text_weights"}  # last.pt is no module
    return trust.flags(config.model_dump(exclude=paths), argv)


def of_recipe(cls: type[options.V], argv: list[str]) -> tuple[options.V, TrainConfig]:
    """The options with the defaults of their recipe, and the resulting recipe."""
    name = options.first(cls, argv, "recipe")
    given = options.parse(cls, argv, load_recipe(name) if name else None)
    return given, options.part(TrainConfig, given)


def _again(argv: list[str]) -> str:
    """The command line that continues this run: the one that started it."""
    _, everywhere, _, here = launch.place()
    if everywhere == 1:
        return shlex.join(["repa", "train", *argv])
    nodes = [f"--nnodes={everywhere // here}", "..."] if everywhere > here else ["--standalone"]
    return shlex.join(["torchrun", *nodes, f"--nproc-per-node={here}", "-m", "repa", "train", *argv])


def about_passes(config: TrainConfig, num_images: int) -> str:
    """A note if the run passes over its images very often; otherwise empty."""
    of_epochs = config.epochs * num_images / config.batch_size
    steps = min(config.num_steps, of_epochs) if config.epochs else config.num_steps
    passes = steps * config.batch_size / num_images
    if passes <= MANY_PASSES:
        return ""
    enough = max(1, MANY_PASSES * num_images // config.batch_size)
    return (
        f"note: {steps:,.0f} steps of {config.batch_size:,} images are {passes:,.0f} passes over {num_images:,} images. After "
        f"more than {MANY_PASSES:,} a network may copy its training images: `repa analyse neighbours` finds copies. "
        f"Fewer steps (--num-steps {enough}) or more images help."
    )


def start(
    config: TrainConfig, data_folder: str | Path, run: Path, command: str = "", typed: Sequence[str] = ()
) -> signal.Signals | None:
    """Train in this process; returns the signal that stopped it early. Torch is imported only here, after the cheap
    checks.

    `command` is the command that continues the run; empty: the same command. `typed` names the settings that the user
    gave; those without effect on these data are errors.
    """
    from repa.base import dist
    from repa.cli.hooks import preview_hooks
    from repa.data import open_checked
    from repa.training import train
    from repa.training.inputs import idle_with
    from repa.training.log import readable

    device = dist.setup()
    with dist.together():
        data = open_checked(data_folder)
        refuse_idle(idle_with(config, data), typed)
    if note := about_passes(config, data.num_images):
        say(note)
    with ProgressBar(run.name, "steps") as bar:

        def progress(state: "TrainState") -> None:
            # Numbers of the last log entry: reading newer ones would wait for the device.
            bar(state.step, config.num_steps, readable(state.metrics) if state.metrics else "")

        hooks = preview_hooks(run, data, device, bar.within, say)
        finished = train(config, data, run, device=device, make_hooks=hooks, progress=progress, say=say)
    if finished.interrupted is not None:
        name, step = finished.interrupted.name, finished.step
        say(
            f"Stopped by {name} after step {step:,} with a checkpoint in {run}. To continue: {command or 'run the same command again'}"
        )
        return finished.interrupted
    sample = ["repa", "sample", str(run), "--num-images", "64"]
    if device.type == "cpu":  # the paper's 250 network calls per image are for a GPU
        sample += ["--sampler", "heun", "--steps", "25"]
    if config.text or reads_text(config.model.backbone):
        sample += ["--prompt-data", str(data_folder)]
    sample += trust.flags(config.model_dump(include={"model", "diffusion", "autoencoder", "text"}))
    say(f"{run}: {finished.step:,} steps done. Next: {shlex.join([*sample, '--out', 'samples.npz'])}")
    return None
