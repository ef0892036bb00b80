"""`repa analyse pictures RUN --data DATA` and `repa analyse progress RUN...`."""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from repa.analysis.checkpoints import checkpoints_of
from repa.analysis.config import FOLDER, HiddenConfig
from repa.base.errors import UserError
from repa.cli import options, tables
from repa.cli.console import ProgressBar, say, speaks
from repa.encoders import ENCODERS
from repa.encoders.loading import check_pairs, weights_for
from repa.sampling.config import SampleConfig

ABOUT_PICTURES = (
    "Tokens as colours: the first three principal components of encoders' tokens and of a run's hidden states, next to the "
    "images. Each picture has components of its own, shared by all images of a column."
)
ABOUT_PROGRESS = "Samples of several checkpoints and runs from the same noise and labels, a row for each checkpoint."
MOST_CHECKPOINTS = 6


class PicturesArguments(options.CheckpointOfRun):
    run: str
    """run folder"""
    data: str
    """Folder of prepared data."""
    encoders: tuple[str, ...] = ("tiny",)
    """Vision encoders to show next to the run; `--encoders` alone shows none."""
    encoder_weights: tuple[str, ...] = ()
    """Local weights of encoders, written ENCODER=PATH."""
    depths: tuple[int, ...] = ()
    """Blocks, counted from 1; empty takes a quarter, half, three quarters and all of the network."""
    times: tuple[float, ...] = (0.0, 0.5)
    """Noise levels t in [0, 1]; 0 is data."""
    images: tuple[int, ...] = ()
    """Rows of the data; empty takes --num-images, evenly spaced."""
    num_images: int = Field(6, ge=1, le=64)
    """How many images."""
    seed: int = 0
    """Seed of the noise."""
    out: str = ""
    """Name of the .png; empty: analysis/pictures.png in the run."""

    def idle(self) -> dict[str, str]:
        of_encoders = {} if self.encoders else {"encoder_weights": "without encoders"}
        return of_encoders | ({"num_images": "with images, which name the rows"} if self.images else {})

    @field_validator("encoders")
    @classmethod
    def _known(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(ENCODERS.check(spec) for spec in specs)

    @field_validator("times")
    @classmethod
    def _in_range(cls, times: tuple[float, ...]) -> tuple[float, ...]:
        return HiddenConfig.parse({"times": times}).times


class ProgressArguments(options.WeightsOfRun, SampleConfig):
    runs: tuple[str, ...] = ()
    """run folders"""
    checkpoints: tuple[int, ...] = ()
    """Steps of checkpoints; empty takes up to six of each run, evenly spaced, the newest among them."""
    num_images: int = Field(8, ge=1, le=64)
    """Images in a row."""
    out: str = ""
    """Name of the .png; empty: analysis/progress.png in the first run."""


def pictures(argv: list[str]) -> int:
    given = options.parse(PicturesArguments, argv, verb="analyse pictures", about=ABOUT_PICTURES, positional=("run",))
    check_pairs(given.encoder_weights)
    (checkpoint,) = checkpoints_of([given.run], [] if given.step is None else [given.step])
    out = tables.output(given.out, Path(given.run) / FOLDER / "pictures.png", ".png")
    import numpy as np

    from repa.analysis.hidden import spaced_rows
    from repa.analysis.pictures import token_pictures
    from repa.base import dist
    from repa.data import open_data
    from repa.data.dataset import load_encoder_of
    from repa.report.pictures import picture_table
    from repa.report.style import write_png

    device, data = dist.setup(), open_data(given.data)
    if wrong := [i for i in given.images if not 0 <= i < data.num_images]:
        raise UserError(f"{given.data} has no image {wrong[0]}: its rows are 0 to {data.num_images - 1}.")
    indices = np.array(given.images) if given.images else spaced_rows(data, given.num_images)
    encoders = {
        spec: load_encoder_of(data, spec, weights=weights_for(spec, given.encoder_weights), device=device)
        for spec in given.encoders
    }
    run = checkpoint.load(given.weights, given.autoencoder_weights, device)
    columns = token_pictures(run, data, indices, encoders, depths=given.depths, times=given.times, seed=given.seed)
    if speaks():
        names = [_short(data.class_names[label]) for label in data.gather("labels", indices)]
        write_png(picture_table(list(zip(*columns.values(), strict=True)), names, list(columns)), out)
        say(f"{out}: tokens of {checkpoint.label}, step {run.step:,}, next to {len(indices)} images.")
    return 0


def progress(argv: list[str]) -> int:
    given = options.parse(
        ProgressArguments, argv, verb="analyse progress", about=ABOUT_PROGRESS, positional=("runs...",)
    )
    config = options.part(SampleConfig, given)
    if not given.runs:
        raise UserError("`repa analyse progress` needs at least one run folder: see `repa analyse progress --help`.")
    checkpoints = checkpoints_of(given.runs, given.checkpoints, MOST_CHECKPOINTS)
    out = tables.output(given.out, Path(given.runs[0]) / FOLDER / "progress.png", ".png")
    from repa.base import dist
    from repa.report.pictures import picture_table
    from repa.report.style import write_png
    from repa.sampling import generate, prepared

    device = dist.setup()
    if dist.active():
        raise UserError("`repa analyse progress` runs in one process: start it without torchrun.")
    rows: list[list[Any]] = []
    names: list[str] = []
    with ProgressBar("samples", "images") as bar:
        for each in checkpoints:
            run = prepared(each.load(given.weights, given.autoencoder_weights, device), config, device)
            assert run.folder is not None  # it was read from there
            row, (of_run, _) = [], given.as_origin_of(run.folder)
            config = options.part(SampleConfig, of_run)
            for start in range(0, given.num_images, config.batch_size):
                part = range(start, min(start + config.batch_size, given.num_images))
                row += list(generate(run, config, part).images.permute(0, 2, 3, 1).numpy())
                bar(len(rows) * given.num_images + len(row), len(checkpoints) * given.num_images)
            rows.append(row)
            names.append(f"{each.label}\nstep {run.step:,}" if len(given.runs) > 1 else f"step {run.step:,}")
    write_png(picture_table(rows, names, []), out)
    say(f"{out}: {len(rows)} checkpoints, {given.num_images} samples each, from the same noise.")
    return 0


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"
