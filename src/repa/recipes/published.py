"""What papers report, as data: `published.csv` has the tables of REPA and of the methods around it. Free of torch.

FIDs are of 50,000 samples of ImageNet at 256 pixels, by the average of the weights, in Inception features. Exactly as many
images of every class (balanced labels) give about 0.1 less than labels drawn at random, so the two never stand in one column.
Steps are of 256 images, an epoch counted as 5,000 of them, as the papers do.
"""

import csv
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

from repa.base.reporting import columns

FACTOR = 8  # pixels per latent, along each side
CLASSES = 1000
IMAGES = 1_281_167  # of ImageNet's training set
SAMPLES = 50_000
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # ADM's statistics
LABELS = ("random", "balanced", "not stated")  # how the classes of samples were drawn
# figures, and what heads their column
NUMBERS = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "accuracy": "probe %",
}  # fmt: skip


class PublishedResult(NamedTuple):
    """What a paper reports of one network; None where it gives no figure."""

    step: int
    fid: float
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    """Of a linear probe, in per cent."""
    sampler: str
    """Of REPA's tables; else empty, as where it is not known how samples were made."""
    guidance: str
    """As a spec, or in words; "none", or "not stated"."""
    model: str
    labels: str
    note: str

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `repa sample`; all samples of REPA's tables take 250 steps."""
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
"""By recipe, or by method. Those of coco-mmdit are of 40,192 captions of MS-COCO 2014's validation set."""


def printed(value: float | None) -> str:
    """A figure with as many decimals as the paper prints: 10.0, 1.42, 0.70."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 and round(value, 1) == value else f"{value:.2f}"


def steps_text(number: int) -> str:
    """'400K', '4M'."""
    return f"{number / 1e6:g}M" if number >= 1_000_000 else f"{number // 1000}K"


def headline(figures: Sequence[PublishedResult], model: str, *, guided: bool = False) -> str:
    """'FID 5.0 at 200K, 1.8 at 4M': the first and the last of the same network, with guidance or without."""
    # A paper's own baseline is another method.
    own = [f for f in figures if f.model == model and (f.guidance != "none") == guided and "baseline" not in f.note]
    return f"FID {first_and_last(own)}" if own else f"no {'guided' if guided else 'unguided'} figure known"


def first_and_last(figures: Sequence[PublishedResult]) -> str:
    """'5.0 at 200K, 1.8 at 4M'."""
    ends = dict.fromkeys([min(figures, key=lambda f: f.step), max(figures, key=lambda f: f.step)])
    return ", ".join(f"{printed(f.fid)} at {steps_text(f.step)}" for f in ends)


def results_table(figures: Sequence[PublishedResult]) -> list[str]:
    """The papers' figures, one line each; a FID stands in the column of the way in which its labels were drawn."""
    if not figures:
        return ["No figure of a paper is known here."]
    table = {"steps of 256": [f"{f.step:,}" for f in figures], "network": [f.model for f in figures]}
    for labels in LABELS:
        table[f"FID, labels {labels}"] = [printed(f.fid) if f.labels == labels else "" for f in figures]
    for key, title in list(NUMBERS.items())[1:]:
        table[title] = ["" if (value := getattr(f, key)) is None else printed(value) for f in figures]
    table |= {"guidance": [f.guidance for f in figures], "": [f.note for f in figures]}
    filled = {title: cells for title, cells in table.items() if any(cells)}
    numbers = [i for i, title in enumerate(filled) if title not in ("network", "guidance", "")]
    return columns([list(filled), *map(list, zip(*filled.values(), strict=True))], right=numbers)
