"""What papers report, as data: `repa.csv` has the tables of REPA, `methods.csv` those of the methods around it. Free of torch.

FIDs are of 50,000 samples of ImageNet at 256 pixels, by the average of the weights, in Inception features. Exactly as many
images of every class (balanced labels) give about 0.1 less than labels drawn at random, so the two never stand in one column.
Steps are of 256 images, an epoch counted as 5,000 of them, as the papers do.
"""

import csv
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from repa.base.reporting import columns

F = TypeVar("F")
FACTOR = 8  # pixels per latent, along each side
CLASSES = 1000
IMAGES = 1_281_167  # of ImageNet's training set
SAMPLES = 50_000
REFERENCE = "VIRTUAL_imagenet256_labeled.npz"  # ADM's statistics
LABELS = ("random", "balanced", "not stated")  # how the classes of samples were drawn


class Figures(NamedTuple):
    """One line of REPA's tables; None where the paper gives no figure."""

    step: int
    fid: float
    sfid: float | None
    inception_score: float | None
    precision: float | None
    recall: float | None
    accuracy: float | None
    """Of a linear probe, in per cent."""
    sampler: str
    """Empty where it is not known how they were sampled."""
    guidance: str

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of `repa sample`; all of the paper's samples take 250 steps."""
        return {"sampler": self.sampler, "steps": 250, "guidance": [self.guidance] if self.guidance else []}


class PublishedFid(NamedTuple):
    """One figure of a method around REPA."""

    model: str
    step: int
    fid: float
    guidance: str
    labels: str
    note: str


def _read(file: str, make: Callable[[dict[str, str]], F]) -> dict[str, tuple[F, ...]]:
    """The lines of a table in this folder by their first column."""
    found: dict[str, tuple[F, ...]] = {}
    with resources.files(__package__).joinpath(file).open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            name = line.pop(next(iter(line)))
            found[name] = (*found.get(name, ()), make(line))
    return found


def _figures(line: dict[str, str]) -> Figures:
    step, sampler, guidance = (line.pop(key) for key in ("step", "sampler", "guidance"))
    numbers: dict[str, Any] = {key: float(text) if text else None for key, text in line.items()}
    return Figures(int(step), **numbers, sampler=sampler, guidance=guidance)


def _published(line: dict[str, str]) -> PublishedFid:
    step, fid = int(line.pop("step")), float(line.pop("fid"))
    return PublishedFid(step=step, fid=fid, **line)


REPA = _read("repa.csv", _figures)
"""By recipe."""
PUBLISHED = _read("methods.csv", _published)
"""By method, or by recipe where a method is one. Those of coco-mmdit are of 40,192 captions of MS-COCO 2014's validation set."""


def printed(value: float | None) -> str:
    """A figure with as many decimals as the paper prints: 10.0, 1.42, 0.70."""
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 1 and round(value, 1) == value else f"{value:.2f}"


def steps_text(number: int) -> str:
    """'400K', '4M'."""
    return f"{number / 1e6:g}M" if number >= 1_000_000 else f"{number // 1000}K"


def headline(figures: Sequence[PublishedFid], model: str, *, guided: bool = False) -> str:
    """'FID 5.0 at 200K, 1.8 at 4M': the first and the last of the same network, with guidance or without."""
    # A paper's own baseline is another method.
    own = [f for f in figures if f.model == model and (f.guidance != "none") == guided and "baseline" not in f.note]
    if not own:
        return f"no {'guided' if guided else 'unguided'} figure known"
    ends = dict.fromkeys([min(own, key=lambda f: f.step), max(own, key=lambda f: f.step)])
    return "FID " + ", ".join(f"{printed(f.fid)} at {steps_text(f.step)}" for f in ends)


def figures_table(figures: Sequence[PublishedFid]) -> list[str]:
    """The papers' figures, one line each; a column for each way of drawing labels."""
    if not figures:
        return ["No figure of a paper is known here."]
    lines = [["steps of 256", "network", *(f"FID, labels {labels}" for labels in LABELS), "guidance", ""]]
    for f in figures:
        cells = [printed(f.fid) if f.labels == labels else "" for labels in LABELS]
        lines.append([f"{f.step:,}", f.model, *cells, f.guidance, f.note])
    return columns(lines)
