"""`repa sample RUN --num-images N --out samples.npz|FOLDER ...`."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from repa.base.errors import UserError
from repa.cli import options
from repa.cli.console import ProgressBar, say
from repa.sampling.config import SampleConfig

if TYPE_CHECKING:
    import torch

    from repa.runs import LoadedRun


class SamplesOfRun(options.CheckpointOfRun, SampleConfig):
    """Options of verbs that generate samples from a run."""


S = TypeVar("S", bound=SamplesOfRun)


def open_run(given: S, folder: str) -> "tuple[S, SampleConfig, LoadedRun, torch.device]":
    """The options, the settings of sampling, and the loaded run on its device; prints notes about them.

    A converted run uses the sampling defaults of its original code, unless an option overrides them.
    """
    from repa.base import dist
    from repa.runs import load_run
    from repa.sampling import about_classes, prepared

    given, as_origin = given.as_origin_of(folder)
    config, device = options.part(SampleConfig, given), dist.setup()
    run = load_run(folder, given.weights, step=given.step, autoencoder_weights=given.autoencoder_weights, device=device)
    run = prepared(run, config, device)
    for note in filter(None, (as_origin, about_classes(config.labels, run))):
        say(note)
    return given, config, run, device


class SampleArguments(SamplesOfRun):
    """Generate images from a run folder: an .npz (arr_0, uint8 NHWC, the format of the ADM evaluator) or a folder of
    PNG files, and a PNG grid of some of them. If interrupted, run the same command again: it continues.
    """

    verb = "sample"
    positional = ("run",)

    run: options.RunFolder
    """run folder"""
    out: str
    """Name of an .npz, such as samples.npz; a name without a suffix makes a folder of PNG files."""
    # Not `num`: torchrun reads --num as an abbreviation of its --numa-binding.
    num_images: int = Field(64, ge=1)
    """Number of images."""
    folders: str = ""
    """Folder for PNGs sorted by prompt, in the layout of GenEval's scorer; empty: none."""
    compile: bool = False
    """Compile the network with torch.compile. Takes up to minutes, so it pays off for many images; pixels may differ by one."""


def main(argv: list[str]) -> int:
    given = options.parse(SampleArguments, argv)
    if given.folders and not given.out.endswith(".npz"):
        raise UserError("--folders needs an .npz: give --out a name such as samples.npz.")
    import torch

    from repa.base import dist
    from repa.base.device import resolved
    from repa.sampling import write_samples
    from repa.sampling.writing import require_folders, write_folders

    given, config, run, device = open_run(given, given.run)
    if given.folders and run.prompts is None:
        raise UserError("--folders sorts samples by prompt, but this run was trained on labels: leave it out.")
    if given.folders:
        dist.on_main(lambda: require_folders(Path(given.folders)))
    if resolved(config.precision, device) != "fp32":
        # TF32 for products that are not in half precision, as in training; fp32 means true float32.
        torch.set_float32_matmul_precision("high")
    if given.compile:
        run.model.compile_blocks()
    calls: list[tuple[int, int]] = []  # network calls per image, images
    made, began = 0, time.perf_counter()
    with ProgressBar(f"sampling {given.run}", "images") as bar:

        def images(done: int, total: int) -> None:
            nonlocal made
            made = done
            bar(done, total)

        out = write_samples(
            run, config, given.num_images, Path(given.out), progress=images, count=lambda *batch: calls.append(batch),
            callback=lambda step: bar(made, given.num_images, f"{step.done:.0%} of a batch"),
        )  # fmt: skip
    if given.folders and (prompts := run.prompts):
        dist.on_main(lambda: write_folders(out, prompts, given.prompt_file, Path(given.folders)))
    speed = ""
    if calls:
        nfe, rate = [n for n, _ in calls], sum(num for _, num in calls) / (time.perf_counter() - began)
        speed = ", NFE " + " to ".join(str(n) for n in sorted({min(nfe), max(nfe)})) + f", {rate:.3g} images/s"
        speed += f" on each of {dist.world()} processes" * dist.active()
    say(
        f"{out}: {given.num_images:,} images of step {run.step:,} ({run.weights} weights){speed}; "
        f"{out.with_suffix('.png')} shows some of them."
    )
    small = " --features tiny-classifier" if device.type == "cpu" else ""  # Inception is slow on a CPU
    say(
        f"Next: repa evaluate {shlex.quote(str(out))} --reference DATA{small}, where DATA is the prepared data of the run"
    )
    return 0
