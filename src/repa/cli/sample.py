"""`repa sample RUN --num-images N --out samples.npz ...`."""

from pathlib import Path

from pydantic import Field

from repa.cli import options
from repa.cli.console import Progress, say
from repa.sampling.config import SampleConfig

ABOUT = "Images from a run folder: an .npz (arr_0, uint8 NHWC, the format of the ADM evaluator) and a PNG grid."


class SampleArguments(SampleConfig):
    run: str
    """run folder"""
    out: str
    """Name of the .npz."""
    num_images: int = Field(64, ge=1)  # not `num`: torchrun takes --num for an abbreviation of its own --numa-binding
    """Number of images."""
    weights: str = "ema"
    """Averaged weights (ema), the raw ones (model), or another average by its name, such as ema-width-0.1 of `repa ema`."""
    checkpoint: int = -1
    """Step of the checkpoint; -1 takes the newest."""
    autoencoder_weights: str = ""
    """Where the weights of the run's autoencoder lie now; empty: where training found them, else the hub's."""
    compile: bool = False
    """Compile the network with torch.compile: up to minutes at the start, which many images repay; pixels may differ by one."""


def main(argv: list[str]) -> int:
    given = options.parse(SampleArguments, argv, verb="sample", about=ABOUT, positional=("run",))
    given, as_origin = given.as_origin_of(given.run)
    config = options.part(SampleConfig, given)
    from repa.base import dist
    from repa.runs import load_run
    from repa.sampling import about_classes, prepared, write_samples

    device = dist.setup()
    step = None if given.checkpoint < 0 else given.checkpoint
    run = load_run(given.run, given.weights, step=step, autoencoder_weights=given.autoencoder_weights, device=device)
    run = prepared(run, config, device)
    if as_origin:
        say(as_origin)
    if note := about_classes(config.labels, run):
        say(note)
    if given.compile:
        run.model.compile()
    calls: list[int] = []
    made = 0
    with Progress(f"sampling {given.run}", "images") as bar:

        def images(done: int, total: int) -> None:
            nonlocal made
            made = done
            bar(done, total)

        out = write_samples(
            run, config, given.num_images, Path(given.out), progress=images, count=calls.append,
            callback=lambda step: bar(made, given.num_images, f"{step.done:.0%} of a batch"),
        )  # fmt: skip
    nfe = ", NFE " + " to ".join(str(n) for n in sorted({min(calls), max(calls)})) if calls else ""
    say(
        f"{out}: {given.num_images:,} images of step {run.step:,} ({run.weights} weights){nfe}; "
        f"{out.with_suffix('.png')} shows some."
    )
    return 0
