"""Recipes, the published results that they reproduce, and the texts that `repa show` prints with both. Torch-free.

`published.csv` has the tables of REPA and of related methods. FIDs are for 50,000 samples of ImageNet at 256 pixels, with
averaged weights and Inception features. Balanced labels (the same number of images per class) give an FID about 0.1 lower
than random labels, so the two have separate columns. Steps have 256 images, and an epoch is counted as 5,000 steps, as in
the papers.
"""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

from repa.base.reporting import columns
from repa.sampling.config import SampleConfig
from repa.training.config import TrainConfig

EIGHT = "torchrun --nproc-per-node 8 -m repa"  # 8 GPUs of one machine
FACTOR = 8  # pixels per latent, along each side
CLASSES = 1000
IMAGES = 1_281_167  # of ImageNet's training set
SAMPLES = 50_000
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # ADM's statistics
LABELS = ("random", "balanced", "not stated")  # choice of the samples' classes
# metric -> heading of its column
NUMBERS = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "accuracy": "probe %",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A complete training configuration, which a call returns, with its description."""

    make: Callable[[], TrainConfig]
    about: str
    """One line for `repa list recipes`."""
    promise: str
    """What it reproduces, the commands, the hardware, and the expected results."""
    samplings: tuple[SampleConfig, ...] = ()
    """Sampling settings of the published results."""
    group: str = "Small runs"
    """Its heading in `repa list recipes`."""
    pixels: int = 0
    """Image side for training on pixels; 0 for a recipe on latents, or one that names its autoencoder."""

    def __call__(self) -> TrainConfig:
        return self.make()

    @classmethod
    def of(cls, make: Callable[[], TrainConfig], *, pixels: int) -> "Recipe":
        """A recipe of a function, described by its docstring."""
        about = " ".join((make.__doc__ or "").split())
        return cls(make, about, about, pixels=pixels)


def paragraphs(*parts: Sequence[str]) -> str:
    """The parts, separated by empty lines."""
    return "\n\n".join("\n".join(part) for part in parts)


def commands(name: str, data: str, prepare: str, sample: str) -> list[str]:
    """Commands from images to results on a machine with eight GPUs; `prepare` and `sample` are options of these commands."""
    samples = f"samples/{name}.npz"
    return [
        f"repa prepare ILSVRC2012/train {data} {prepare}",
        f"{EIGHT} train {name} --data {data} --out runs/{name}",
        f"{EIGHT} sample runs/{name} --num-images 50000 {sample} --out {samples}",
        f"repa evaluate {samples} --reference {data} --neighbours float16",
    ]


class PublishedResult(NamedTuple):
    """A paper's results for one network; None if it reports no value."""

    step: int
    fid: float
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    """Accuracy of a linear probe, in per cent."""
    sampler: str
    """Sampler of REPA's tables; empty for other papers or if unknown."""
    guidance: str
    """A spec, a description, "none", or "not stated"."""
    model: str
    labels: str
    note: str

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `repa sample`; all samples of REPA's tables have 250 steps."""
        return {"sampler": self.sampler, "steps": 250, "guidance": [] if self.guidance == "none" else [self.guidance]}


def _read() -> dict[str, tuple[PublishedResult, ...]]:
    found: dict[str, tuple[PublishedResult, ...]] = {}
    with resources.files(__package__).joinpath("published.csv").open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            values: dict[str, Any] = {key: float(line[key]) if line[key] else None for key in NUMBERS}
            values |= {key: line[key] for key in ("sampler", "guidance", "model", "labels", "note")}
            figures = PublishedResult(int(line["step"]), **values)
            found[line["of"]] = (*found.get(line["of"], ()), figures)
    return found


PUBLISHED = _read()
"""Results by recipe or method. Those of coco-mmdit are for 40,192 captions of MS-COCO 2014's validation set."""


def printed(value: float | None) -> str:
    """A result with the paper's number of decimals: 10.0, 1.42, 0.70."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 and round(value, 1) == value else f"{value:.2f}"


def steps_text(number: int) -> str:
    """'400K', '4M'."""
    return f"{number / 1e6:g}M" if number >= 1_000_000 else f"{number // 1000}K"


def headline(figures: Sequence[PublishedResult], model: str, *, guided: bool = False) -> str:
    """'FID 5.0 at 200K, 1.8 at 4M': the first and the last result of the same network, with or without guidance."""
    # A paper's own baseline is another method.
    own = [f for f in figures if f.model == model and (f.guidance != "none") == guided and "baseline" not in f.note]
    return f"FID {first_and_last(own)}" if own else f"no {'guided' if guided else 'unguided'} result known"


def first_and_last(figures: Sequence[PublishedResult]) -> str:
    """'5.0 at 200K, 1.8 at 4M'."""
    ends = dict.fromkeys([min(figures, key=lambda f: f.step), max(figures, key=lambda f: f.step)])
    return ", ".join(f"{printed(f.fid)} at {steps_text(f.step)}" for f in ends)


def results_table(figures: Sequence[PublishedResult]) -> list[str]:
    """The papers' results, one per line; the column of an FID depends on its labels."""
    if not figures:
        return ["No published results are known."]
    table = {"steps of 256": [f"{f.step:,}" for f in figures], "network": [f.model for f in figures]}
    for labels in LABELS:
        table[f"FID, labels {labels}"] = [printed(f.fid) if f.labels == labels else "" for f in figures]
    for key, title in list(NUMBERS.items())[1:]:
        table[title] = ["" if (value := getattr(f, key)) is None else printed(value) for f in figures]
    table |= {"guidance": [f.guidance for f in figures], "": [f.note for f in figures]}
    filled = {title: cells for title, cells in table.items() if any(cells)}
    numbers = [i for i, title in enumerate(filled) if title not in ("network", "guidance", "")]
    return columns([list(filled), *map(list, zip(*filled.values(), strict=True))], right=numbers)
