"""`repa analyse neighbours SAMPLES --data DATA --features ENCODER`."""

from pathlib import Path

from repa.analysis.config import NeighboursConfig
from repa.base.errors import UserError
from repa.cli import options, tables
from repa.cli.console import ProgressBar, say

ABOUT = (
    "The nearest training images of samples in the features of an encoder, and whether samples come nearer to the training "
    "images than real images that were not trained on do. Writes rows (.json, .csv) and a picture (.png)."
)
SHOWN = 8  # samples in the picture: the nearest of all


class NeighboursArguments(NeighboursConfig):
    samples: str
    """samples: an .npz with arr_0, a folder or zip of images"""
    data: str
    """Folder of prepared data that the model was trained on."""
    held_out: str = ""
    """Folder of prepared data that it was not trained on; empty compares each training image with its nearest other."""
    out: str = "neighbours.json"
    """Name of the .json. The .csv and .png are written next to it."""


def neighbours(argv: list[str]) -> int:
    given = options.parse(NeighboursArguments, argv, verb="analyse neighbours", about=ABOUT, positional=("samples",))
    config = options.part(NeighboursConfig, given)
    out = tables.output(given.out, Path())
    import numpy as np

    from repa.analysis import find_copies
    from repa.base import dist
    from repa.data import open_data
    from repa.evaluation import open_images
    from repa.report.pictures import picture_table
    from repa.report.style import write_png

    device = dist.setup()
    if dist.active():
        raise UserError("`repa analyse neighbours` runs in one process: start it without torchrun.")
    data, samples = open_data(given.data), open_images(given.samples)
    held_out = open_data(given.held_out) if given.held_out else None
    if (samples.height, samples.width) != (data.resolution, data.resolution):
        raise UserError(
            f"{given.samples} holds images of {samples.height}x{samples.width} pixels, {given.data} of {data.resolution}: "
            "compare what has the same size."
        )
    with ProgressBar(f"features of {config.features}", "images") as bar:
        made = (images for _, images in samples.batches(config.batch_size))
        found = find_copies(made, samples.num, data, config, held_out=held_out, device=device, progress=bar)
    verdict = found.verdict
    tables.write(out, {**tables.how("neighbours", given), "verdict": verdict._asdict()}, found.rows())
    what = "held-out images" if held_out else "training images (each to its nearest other)"
    say(
        f"distance to the nearest training image, median: samples {verdict.median:.4f}, {what} {verdict.median_held_out:.4f}"
    )
    say(
        f"nearer than {verdict.threshold:.4f}, as 1 % of the {what} are: {100 * verdict.share_near:.1f} % of the samples "
        "(about 1 % where nothing is copied)"
    )
    shown = found.beside(lambda i: samples.rows(np.array([i])), data, SHOWN)
    pictures = [list(images.permute(0, 2, 3, 1).numpy()) for images in shown.values()]
    labels = [f"sample {i}\n{found.near.distances[i, 0]:.3f}" for i in shown]
    columns = ["sample", *(f"{n + 1}. nearest" for n in range(config.neighbours))]
    write_png(picture_table(pictures, labels, columns), out.with_suffix(".png"))
    say(f"{out}, .csv, and .png: the {len(shown)} samples with the smallest distance, next to their nearest images.")
    return 0
