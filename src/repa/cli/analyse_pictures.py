"""The analyses whose result is a picture: `repa analyse pictures`, `progress` and `neighbours`."""

import contextlib
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from repa.analysis.config import FOLDER, NeighboursConfig, checkpoints_of
from repa.base import files
from repa.base.errors import UserError
from repa.base.registry import Spec
from repa.cli import options, tables
from repa.cli.console import ProgressBar, say, short, speaks
from repa.encoders import ENCODERS
from repa.encoders.loading import LocalWeights
from repa.runs import layout
from repa.sampling.config import SampleConfig

if TYPE_CHECKING:
    import torch

MOST_CHECKPOINTS = 6
MOST_COPIES = 8  # samples in the picture of neighbours
LONGEST_NAME = 16  # letters of the name of a class


class PicturesArguments(options.CheckpointOfRun):
    """Tokens as colours: the first three principal components of encoders' tokens and of a run's hidden states, beside
    the images. The images of a column share their components.
    """

    verb = "analyse pictures"
    positional = ("run",)

    run: options.RunFolder
    """run folder"""
    data: options.DataFolder
    """Folder of prepared data."""
    encoders: tuple[Annotated[str, Spec(ENCODERS)], ...] = ("tiny",)
    """Vision encoders to show beside the run; `--encoders` without a value shows none."""
    encoder_weights: LocalWeights = Field({})
    """Local weights of encoders, written ENCODER=PATH."""
    depths: tuple[int, ...] = ()
    """Blocks, counted from 1; empty: at 1/4, 1/2, 3/4 and the end of the network."""
    times: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field((0.0, 0.5), min_length=1)
    """Noise levels t in [0, 1]; 0 is data."""
    images: tuple[int, ...] = ()
    """Indices of images in the data; empty: --num-images evenly spaced ones."""
    num_images: int = Field(6, ge=1, le=64)
    """Number of images."""
    seed: int = 0
    """Seed of the noise."""
    out: str = ""
    """Name of the .png; empty: analysis/pictures.png in the run."""

    def idle(self) -> dict[str, str]:
        of_encoders = {} if self.encoders else {"encoder_weights": "without --encoders"}
        return of_encoders | ({"num_images": "with --images"} if self.images else {})


class ProgressArguments(options.WeightsOfRun, SampleConfig):
    """Samples of several checkpoints and runs from the same noise and labels, one row per checkpoint."""

    verb = "analyse progress"
    positional = ("runs...",)

    runs: options.RunFolders = Field(min_length=1)
    """run folders"""
    checkpoints: tuple[int, ...] = ()
    """Steps of the checkpoints; empty: up to six of each run, evenly spaced, including the newest."""
    num_images: int = Field(8, ge=1, le=64)
    """Images per row."""
    out: str = ""
    """Name of the .png; empty: analysis/progress.png in the first run."""


class NeighboursArguments(NeighboursConfig, options.Command):
    """The nearest training images of samples in the features of an encoder, and the share of samples that are nearer
    than held-out real images are. Writes a table (.json, .csv) and a picture (.png).
    """

    verb = "analyse neighbours"
    positional = ("samples",)

    samples: options.Images
    """samples: an .npz with arr_0, a folder or zip of images"""
    data: options.DataFolder
    """Folder of prepared data that the model was trained on."""
    held_out: options.DataFolder = ""
    """Folder of prepared data outside the training data; empty: compare each training image with its nearest other image."""
    out: str = ""
    """Name of the .json; the .csv and .png are written beside it. Empty: analysis/neighbours.json in the run of the
    samples, or in the current folder if that run is unknown."""


def pictures(argv: list[str], held: ExitStack) -> int:
    given = options.parse(PicturesArguments, argv)
    (checkpoint,) = checkpoints_of([given.run], [] if given.step is None else [given.step])
    out = tables.output(held, given.out, Path(given.run) / FOLDER / "pictures.png", ".png")
    import numpy as np

    from repa.analysis.blocks import token_pictures
    from repa.analysis.hidden import spaced_rows
    from repa.base import dist
    from repa.data import open_checked
    from repa.data.dataset import load_encoder_of
    from repa.report.pictures import picture_table
    from repa.report.style import write_png

    device, data = dist.setup(), open_checked(given.data)
    if wrong := [i for i in given.images if not 0 <= i < data.num_images]:
        raise UserError(f"{given.data} has no image {wrong[0]}: give indices from 0 to {data.num_images - 1}.")
    indices = np.array(given.images) if given.images else spaced_rows(data, given.num_images)
    encoders = {
        spec: load_encoder_of(data, spec, weights=given.encoder_weights.get(spec), device=device)
        for spec in given.encoders
    }
    run = checkpoint.load(given.weights, given.autoencoder_weights, device)
    columns = token_pictures(run, data, indices, encoders, depths=given.depths, times=given.times, seed=given.seed)
    if speaks():
        names = [short(data.class_names[label], LONGEST_NAME) for label in data.gather("labels", indices)]
        write_png(picture_table(list(zip(*columns.values(), strict=True)), names, list(columns)), out)
        say(f"{out}: tokens of {checkpoint.label}, step {run.step:,}, beside {len(indices)} images.")
    return 0


def progress(argv: list[str], held: ExitStack) -> int:
    given = options.parse(ProgressArguments, argv)
    checkpoints = checkpoints_of(given.runs, given.checkpoints, MOST_CHECKPOINTS)
    out = tables.output(held, given.out, Path(given.runs[0]) / FOLDER / "progress.png", ".png")
    from repa.report.pictures import picture_table
    from repa.report.style import write_png
    from repa.sampling import generate, prepared

    device = _of_one_process("progress")
    rows: list[list[Any]] = []
    names: list[str] = []
    with ProgressBar("samples", "images") as bar:
        for each in checkpoints:
            # A converted run uses the sampling defaults of its original code, unless an option overrides them.
            config = options.part(SampleConfig, given.as_origin_of(each.run)[0])
            run = prepared(each.load(given.weights, given.autoencoder_weights, device), config, device)
            row: list[Any] = []
            for start in range(0, given.num_images, config.batch_size):
                part = range(start, min(start + config.batch_size, given.num_images))
                row += list(generate(run, config, part).images.permute(0, 2, 3, 1).numpy())
                bar(len(rows) * given.num_images + len(row), len(checkpoints) * given.num_images)
            rows.append(row)
            names.append(f"{each.label}\nstep {run.step:,}" if len(given.runs) > 1 else f"step {run.step:,}")
    write_png(picture_table(rows, names, []), out)
    say(f"{out}: {len(rows)} checkpoints, {given.num_images} samples each, from the same noise.")
    return 0


def neighbours(argv: list[str], held: ExitStack) -> int:
    given = options.parse(NeighboursArguments, argv)
    config = options.part(NeighboursConfig, given)
    run = _run_of(Path(given.samples))
    out = tables.output(held, given.out, Path("neighbours.json") if run is None else run / FOLDER / "neighbours.json")
    import numpy as np

    from repa.analysis import find_copies
    from repa.data import open_checked
    from repa.evaluation import open_images
    from repa.report.pictures import picture_table
    from repa.report.style import write_png

    device = _of_one_process("neighbours")
    data, samples = open_checked(given.data), open_images(given.samples)
    held_out = open_checked(given.held_out) if given.held_out else None
    if (samples.height, samples.width) != (data.resolution, data.resolution):
        raise UserError(
            f"{given.samples} holds images of {samples.height}x{samples.width} pixels, {given.data} of {data.resolution}: "
            "compare images of the same size."
        )
    with ProgressBar(f"features of {config.features}", "images") as bar:
        made = (images for _, images in samples.batches(config.batch_size))
        found = find_copies(made, samples.num, data, config, held_out=held_out, device=device, progress=bar)
    verdict = found.verdict
    tables.write(out, {**tables.how("neighbours", given), "verdict": verdict._asdict()}, found.rows())
    what = "held-out images" if held_out else "training images (each to its nearest other)"
    say(
        f"distance to the nearest training image, median: samples {verdict.median:.4f}, {what} {verdict.median_held_out:.4f}",
        f"nearer than {verdict.threshold:.4f}, as 1 % of the {what} are: {100 * verdict.share_near:.1f} % of the samples "
        "(about 1 % if nothing is copied)",
    )
    shown = found.beside(lambda i: samples.rows(np.array([i])), data, MOST_COPIES)
    rows = [list(images.permute(0, 2, 3, 1).numpy()) for images in shown.values()]
    labels = [f"sample {i}\n{found.near.distances[i, 0]:.3f}" for i in shown]
    columns = ["sample", *(f"{n + 1}. nearest" for n in range(config.neighbours))]
    write_png(picture_table(rows, labels, columns), out.with_suffix(".png"))
    say(f"{out}, .csv, and .png: the {len(shown)} samples with the smallest distance, beside their nearest images.")
    return 0


def _run_of(samples: Path) -> Path | None:
    """The run folder in the record that `repa sample` writes beside samples; None if there is none."""
    record = samples.resolve().with_suffix(".json")
    run: object = None
    if samples.suffix in (".npz", "") and record.is_file():
        with contextlib.suppress(UserError):  # beside other images a file of this name may hold anything
            run = files.read_object(record).get("run")
    return Path(run) if isinstance(run, str) and (Path(run) / layout.CONFIG).is_file() else None


def _of_one_process(what: str) -> "torch.device":
    from repa.base import dist

    device = dist.setup()
    if dist.active():
        raise UserError(f"`repa analyse {what}` runs in one process: start it without torchrun.")
    return device
