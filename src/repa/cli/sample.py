"""`repa sample RUN --num-images N --out samples.npz|FOLDER ...`."""

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
    """Options of verbs that make samples of a run."""


S = TypeVar("S", bound=SamplesOfRun)


def open_run(given: S, folder: str) -> "tuple[S, SampleConfig, LoadedRun, torch.device]":
    """The options and settings with which a run is sampled, and its network ready for that; says what is worth knowing of both.

    A converted run is sampled as by the code that trained it, in what no option says otherwise.
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
    """Images from a run folder: an .npz (arr_0, uint8 NHWC, the format of the ADM evaluator), or a folder of PNG
    files, and a PNG grid of some of them. The same command continues after any stop.
    """

    verb = "sample"
    positional = ("run",)

    run: str
    """run folder"""
    out: str
    """Name of an .npz, such as samples.npz; a name without an ending makes a folder of PNG files."""
    # Not `num`: torchrun takes --num for an abbreviation of its --numa-binding.
    num_images: int = Field(64, ge=1)
    """Number of images."""
    folders: str = ""
    """Also write a folder of PNGs for each prompt, as GenEval's scorer and others read them; empty writes none."""
    compile: bool = False
    """Compile the network with torch.compile: up to minutes at the start, which pays off for many images; pixels may differ by one."""


def main(argv: list[str]) -> int:
    given = options.parse(SampleArguments, argv)
    if given.folders and not given.out.endswith(".npz"):
        raise UserError("--folders lays out the images of an .npz: give --out a name such as samples.npz.")
    import torch

    from repa.base import dist
    from repa.base.precision import resolved
    from repa.sampling import write_samples
    from repa.sampling.writing import require_folders, write_folders

    given, config, run, device = open_run(given, given.run)
    if given.folders and run.prompts is None:
        raise UserError("--folders sorts samples by their prompts, but this run was trained on labels: leave it out.")
    if given.folders:
        dist.on_main(lambda: require_folders(Path(given.folders)))
    if resolved(config.precision, device) != "fp32":
        # TF32 for the products that are not in half precision, as in training; fp32 means float32.
        torch.set_float32_matmul_precision("high")
    if given.compile:
        run.model.compile_blocks()
    calls: list[tuple[int, int]] = []  # of the network per image, images
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
        f"{out.with_suffix('.png')} shows some."
    )
    return 0
